"""When to fuse: where the receiver is unsure, or as the gates say; elsewhere it answers alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .intervals import accuracy_interval
from .records import Record

#: Shares of the questions that fuse, for the curve.
SHARES = tuple(step / 10 for step in range(11))


#: What may decide: a record's field, and whose record holds it.
SIGNALS = {"confidence": "receiver", "gate_weight": "c2c"}


def abstention(
    receiver: dict[str, Record], fused: dict[str, Record], signal: str = "confidence", seed: int = 0
) -> dict[str, Any] | None:
    """Compute what fusing some of the questions only would give.

    The threshold on the signal is chosen on one half of the items for the other and the other way round, so that no
    item has a say in its own decision. For `"gate_weight"` it is also chosen there whether wide gates speak for fusing
    or against it. The curve fuses those items first of which the receiver is least sure, or whose gates open widest.

    Args:
        receiver: Its records by item, with `confidence`, its probability of its own answer.
        fused: Those of C2C, with `gate_weight`, see [`~gate_weights.watch_gate_weights`].
        signal: Of `SIGNALS`.
        seed: Of the halves.

    Returns:
        `curve`: `[share fused, accuracy]`; `calibrated`: accuracy, its interval, and the share of items that fuse;
        `oracle`: the accuracy if one knew for each item which of both is right; `None` where there is no such signal,
        as there is no confidence in written answers, or fewer than four items.
    """
    both = sorted(receiver.keys() & fused.keys())
    holders = {"receiver": receiver, "c2c": fused}[SIGNALS[signal]]
    if len(both) < 4 or any(signal not in holders[item] and "error" not in holders[item] for item in both):
        return None
    alone, together = (np.array([records[item]["correct"] for item in both]) for records in (receiver, fused))
    # An item that failed is one that the receiver is not sure of, or for which no gate opened.
    values = np.array([holders[item].get(signal, 0.0) for item in both])
    values, directions = (values, [1]) if signal == "confidence" else (-values, [1, -1])
    order = np.argsort(values, kind="stable")
    curve = []
    for share in SHARES:
        fuses = np.zeros(len(both), dtype=bool)
        fuses[order[: round(share * len(both))]] = True
        curve.append([share, float(np.where(fuses, together, alone).mean())])
    halves = np.random.default_rng(seed).permutation(len(both)) % 2
    decided = np.zeros(len(both), dtype=bool)
    for half in (0, 1):
        other = halves != half
        rules = [(*_best_threshold(sign * values[other], together[other] - alone[other]), sign) for sign in directions]
        # The first of equal ones.
        _, threshold, sign = max(rules, key=lambda rule: rule[0])
        decided |= (halves == half) & (sign * values <= threshold)
    correct = np.where(decided, together, alone)
    return {
        "signal": signal,
        "num_items": len(both),
        "curve": curve,
        "calibrated": {
            "value": float(correct.mean()),
            "interval": list(accuracy_interval(correct.tolist())),
            "share_fused": float(decided.mean()),
        },
        "oracle": float(np.maximum(alone, together).mean()),
    }


def _best_threshold(values: np.ndarray, gains: np.ndarray) -> tuple[float, float]:
    """Return how much fusing gains at most, in sum, and up to which value: half way to the next item's."""
    order = np.argsort(values, kind="stable")
    sums: Sequence[float] = np.concatenate([[0.0], np.cumsum(gains[order])]).tolist()
    bounds = np.concatenate([[-np.inf], values[order], [np.inf]])
    best = int(np.argmax(sums))
    return sums[best], float(bounds[best] + bounds[best + 1]) / 2
