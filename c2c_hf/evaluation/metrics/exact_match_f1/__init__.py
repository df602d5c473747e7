"""`ExactMatchF1`."""

from .exact_match_f1 import AnswerScores, ExactMatchF1, answer_scores, normalize_answer

__all__ = ["AnswerScores", "ExactMatchF1", "answer_scores", "normalize_answer"]
