"""Base models, fuser weights, fingerprints and adapters: loading, comparing, saving."""
