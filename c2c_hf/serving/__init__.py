"""Engines and servers that answer with a fuser."""
