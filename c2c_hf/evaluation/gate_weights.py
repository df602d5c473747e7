"""How wide a fuser opens for each question: the mean weight of what it adds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..modeling_c2c import C2CForCausalLM


@contextmanager
def watch_gate_weights(model: C2CForCausalLM, alignments: Sequence[torch.Tensor]) -> Iterator[list[float]]:
    """Watch the fusers while a batch is read.

    Args:
        model: The pair, whose fusers have gates.
        alignments: Per sharer `(batch_size, seq_len)`, the batch's `sharer_alignment`.

    Yields:
        A list, filled at the end: for each row the mean of gate times dynamic weight (arXiv 2510.03215), from 0 to 1,
        over the tokens that fuse, all layers' keys and values, and their heads; 0 where nothing fuses.
    """
    sums: dict[int, torch.Tensor] = {}

    def added_up(index: int) -> Callable[..., None]:
        def add(_: Any, __: Any, logits: torch.Tensor) -> None:
            # Entries whose gate is shut are not computed, and add nothing.
            weights = torch.sigmoid(logits.float()).sum((0, 2))
            sums[index] = sums[index] + weights if index in sums else weights

        return add

    hooks = [
        group.projector.weight_proj.register_forward_hook(added_up(index))
        for index, fuser in enumerate(model.fuser)
        for group in fuser.groups
    ]
    means: list[float] = []
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()
    totals, counts = torch.zeros(2, alignments[0].shape[0])
    for index, weights in sums.items():
        rows = (alignments[index] >= 0).nonzero()[:, 0].cpu()
        heads = sum(len(group.entries) * group.projector.num_heads for group in model.fuser[index].groups)
        totals.index_add_(0, rows, weights.cpu() / heads)
        counts += torch.bincount(rows, minlength=len(counts))
    means += (totals / counts.clamp_min(1)).tolist()
