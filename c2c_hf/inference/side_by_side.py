"""Several models that read at the same time, each in a thread of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
from transformers import PreTrainedModel

from .passing_caches import is_untouched
from .prefill import input_device

#: A model, and a call in which no other works.
Reading = tuple[PreTrainedModel, Callable[[], Any]]
#: Texts of more tokens keep all cores busy, and two models' working memory would add up for nothing: both prefills
#: of the demo pair at once take 0.6 of their time one by one for 64 to 512 tokens, 0.7 for 1,024 and 0.9 for 2,048
#: (bfloat16, two cores; in float32 0.9, 0.95 and 0.95).
MOST_TOKENS = 1024


def side_by_side(readings: Sequence[Reading], num_tokens: int) -> list[Any]:
    """Let models read at the same time where that is faster, else one after the other.

    It is faster on a processor: one model alone leaves cores idle between its many small operations. Other devices
    have queues, in which the models' work overlaps as it is.

    Args:
        readings: The first runs in the calling thread, and may build an autograd graph there.
        num_tokens: How many tokens a model reads, of all rows together.

    Returns:
        What each returned.
    """
    if num_tokens > MOST_TOKENS or not _may_overlap([model for model, _ in readings]):
        return [read() for _, read in readings]
    (_, first), *others = readings
    # Threads that outlive the call would be missing in a forked process.
    with ThreadPoolExecutor(len(others)) as pool:
        futures = [pool.submit(copy_context().run, _in_the_same_mode(read)) for _, read in others]
        return [first(), *(future.result() for future in futures)]


def _may_overlap(models: Sequence[PreTrainedModel]) -> bool:
    """Say whether models work on the processor, each with its own weights, and nothing watches this thread."""
    return (
        1 < len(models) == len({id(model) for model in models})
        # Whoever allows one thread means it.
        and torch.get_num_threads() > 1
        and not _is_watched()
        and all(input_device(model).type == "cpu" and is_untouched(model) for model in models)
    )


def _is_watched() -> bool:
    """Say whether a profiler, a tracer or a mode such as a counter of operations sees what this thread computes."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch.autograd._profiler_enabled()


def _in_the_same_mode(read: Callable[[], Any]) -> Callable[[], Any]:
    """Let a call see the calling thread's modes of autograd and autocast, which a new thread does not have."""
    learns, infers = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run() -> Any:
        with torch.inference_mode(infers), torch.set_grad_enabled(learns), torch.autocast("cpu", dtype, casts):
            return read()

    return run
