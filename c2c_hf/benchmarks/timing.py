"""Seconds of several functions, timed in turn, and the peak of memory."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Rounds:
    """Seconds of several functions, timed in turn.

    Attributes:
        seconds: Per name one number a round.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """Return the fastest and the slowest round."""
        return min(self.seconds[name]), max(self.seconds[name])

    def ratio(self, name: str, *others: str) -> float:
        """Return the median over the rounds of one function's time over the sum of others'."""
        sums = [sum(parts) for parts in zip(*(self.seconds[other] for other in others), strict=True)]
        return statistics.median(own / whole for own, whole in zip(self.seconds[name], sums, strict=True))


def time_in_turn(functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Rounds:
    """Time functions in turn, so that a noisy machine slows all of them alike.

    Args:
        functions: By name.
        rounds: How often each is timed.
        warmup: Rounds before, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return Rounds(seconds)


def synchronize() -> None:
    """Wait for the work that is queued on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> bool:
    """Start to measure the peak of memory; `False` where neither CUDA nor Linux reports one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    # Memory that was freed but not returned to the system would count.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Return the peak since [`reset_peak_memory`] in bytes: of a GPU's tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
