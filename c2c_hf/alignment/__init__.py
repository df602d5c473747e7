"""Token alignment between two tokenizers; no models."""
