"""Evaluation: tasks, methods, controls, statistics and the report; the engine is lm-evaluation-harness."""
