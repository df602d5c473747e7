"""`PerformanceGapRecovered`."""

from .performance_gap_recovered import PerformanceGapRecovered, gap_recovered

__all__ = ["PerformanceGapRecovered", "gap_recovered"]
