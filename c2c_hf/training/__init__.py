"""Training of fusers: trainer, arguments, data, losses."""
