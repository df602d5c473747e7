"""Evaluation methods: baselines, C2C, its controls and its payload ablations."""
