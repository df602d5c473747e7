"""Fits in closed form: memory fusers, and the layer mapping of fusion mode."""
