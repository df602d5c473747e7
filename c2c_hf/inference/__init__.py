"""Frozen models run: prefill, caches, fusion, memory slots."""
