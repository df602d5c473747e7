"""Benchmarks: data, prompts (as lm-evaluation-harness task files), and extraction of answers from generated text."""
