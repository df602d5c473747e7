"""Evaluation: benchmarks, methods with controls, metrics, and the report; the engine is lm-evaluation-harness."""
