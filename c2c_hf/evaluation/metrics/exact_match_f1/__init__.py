"""`ExactMatchF1`."""

from .exact_match_f1 import ExactMatchF1, normalize_answer

__all__ = ["ExactMatchF1", "normalize_answer"]
