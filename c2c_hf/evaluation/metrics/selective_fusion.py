"""Selective fusion: the accuracy if only some items are fused, chosen by a signal."""

from collections.abc import Sequence

import numpy as np

from .intervals import wilson_interval

#: Shares of the items that are fused, for the curve.
SHARES = tuple(step / 10 for step in range(11))


def selective_fusion(
    receiver_correct: Sequence[float],
    fused_correct: Sequence[float],
    signal: Sequence[float],
    signs: Sequence[int] = (1,),
    seed: int = 0,
) -> dict[str, object]:
    """Compute the accuracy of fusing only items whose signal is small, or large.

    The threshold is chosen on one half of the items for the other, and the other way round, so that no item takes part
    in its own decision. With both signs it is also chosen there whether small or large signals are fused.

    Args:
        receiver_correct: 1 where the receiver is right without fusion, else 0; at least two items.
        fused_correct: C2C's, in the same order.
        signal: One number per item.
        signs: To choose from: with 1 small signals are fused, with -1 large ones. The first one orders the curve.
        seed: Of the halves.

    Returns:
        `num_items`; `curve`: `[share fused, accuracy]`; `calibrated`: accuracy (`value`), its `interval`, and the
        share of the items that are fused (`share_fused`); `oracle`: the accuracy if for each item the better of both
        were known.
    """
    receiver, fused, values = (np.asarray(array, dtype=float) for array in (receiver_correct, fused_correct, signal))
    order = np.argsort(signs[0] * values, kind="stable")
    curve = []
    for share in SHARES:
        chosen = np.zeros(len(values), dtype=bool)
        chosen[order[: round(share * len(values))]] = True
        curve.append([share, float(np.where(chosen, fused, receiver).mean())])
    halves = np.random.default_rng(seed).permutation(len(values)) % 2
    chosen = np.zeros(len(values), dtype=bool)
    for half in (0, 1):
        other = halves != half
        rules = [(*_best_threshold(sign * values[other], (fused - receiver)[other]), sign) for sign in signs]
        # `max` takes the first of equal ones.
        _, threshold, sign = max(rules, key=lambda rule: rule[0])
        chosen |= (halves == half) & (sign * values <= threshold)
    correct = np.where(chosen, fused, receiver)
    return {
        "num_items": len(values),
        "curve": curve,
        "calibrated": {
            "value": float(correct.mean()),
            "interval": list(wilson_interval(correct.tolist())),
            "share_fused": float(chosen.mean()),
        },
        "oracle": float(np.maximum(receiver, fused).mean()),
    }


def _best_threshold(values: np.ndarray, gains: np.ndarray) -> tuple[float, float]:
    """Return the largest sum of gains, and up to which value to fuse for it: halfway to the next item's."""
    order = np.argsort(values, kind="stable")
    sums: list[float] = np.concatenate([[0.0], np.cumsum(gains[order])]).tolist()
    bounds = np.concatenate([[-np.inf], values[order], [np.inf]])
    best = int(np.argmax(sums))
    return sums[best], float(bounds[best] + bounds[best + 1]) / 2
