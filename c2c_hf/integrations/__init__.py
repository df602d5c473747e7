"""Classes by which other libraries' own interfaces use a C2C model."""
