"""Kind training: losses and procedures. Losses are modules; procedures take models and data loaders, nothing hidden."""
