"""What the atlas pages of the docs are made of."""
