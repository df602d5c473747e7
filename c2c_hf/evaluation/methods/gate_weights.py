"""Mean gate weight per question: how much of the fuser's change reaches the receiver's states."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ...fusers.c2c import C2CFuser


@contextmanager
def record_gate_weights(fusers: Sequence[C2CFuser], alignments: Sequence[torch.Tensor]) -> Iterator[list[float]]:
    """Record the gates' weights of one batch's prefill.

    Args:
        fusers: One per sharer.
        alignments: Per sharer `(batch_size, seq_len)`, the batch's `sharer_alignment`.

    Yields:
        A list, filled at the end: for each row the mean of gate times dynamic weight (arXiv 2510.03215, section 3.3),
        from 0 to 1, over the fused tokens, all layers' keys and values, and their heads; 0 where nothing is fused.
    """
    sums: dict[int, torch.Tensor] = {}
    #: The fuser that runs: several may have the same projectors.
    running = 0

    def start(index: int, module: nn.Module, inputs: object) -> None:
        nonlocal running
        running = index

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        # Entries whose gate is closed are not computed: their weight is 0.
        weights = torch.sigmoid(logits.float()).sum((0, 2))
        sums[running] = sums[running] + weights if running in sums else weights

    hooks = [fuser.register_forward_pre_hook(partial(start, index)) for index, fuser in enumerate(fusers)]
    layers = {group.projector.weight_proj for fuser in fusers for group in fuser.groups}
    hooks += [layer.register_forward_hook(add) for layer in layers]
    means: list[float] = []
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()
    totals, counts = torch.zeros(2, alignments[0].shape[0])
    for index, weights in sums.items():
        rows = (alignments[index] >= 0).nonzero()[:, 0].cpu()
        heads = sum(len(group.entries) * group.projector.num_heads for group in fusers[index].groups)
        totals.index_add_(0, rows, weights.cpu() / heads)
        counts += torch.bincount(rows, minlength=len(counts))
    means += (totals / counts.clamp_min(1)).tolist()
