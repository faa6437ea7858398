"""Kind token: layers through which a query stream reads a key/value stream. `base` is the contract."""
