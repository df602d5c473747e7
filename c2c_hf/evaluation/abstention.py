"""When to fuse: the receiver answers alone where it is sure, and with its sharers elsewhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .intervals import accuracy_interval
from .records import Record

#: Shares of the questions that fuse, for the curve.
SHARES = tuple(step / 10 for step in range(11))


def abstention(receiver: dict[str, Record], fused: dict[str, Record], seed: int = 0) -> dict[str, Any] | None:
    """Compute what fusing only where the receiver is unsure would give.

    The threshold on the receiver's confidence is chosen on one half of the items for the other and the other way
    round, so that no item has a say in its own decision. The curve fuses the least sure share of all items.

    Args:
        receiver: Its records by item, with `confidence`, its probability of its own answer.
        fused: Those of C2C.
        seed: Of the halves.

    Returns:
        `curve`: `[share fused, accuracy]`; `calibrated`: accuracy, its interval, and the share of items that fuse;
        `oracle`: the accuracy if one knew for each item which of both is right; `None` where there is no confidence,
        as with written answers, or fewer than four items.
    """
    both = sorted(receiver.keys() & fused.keys())
    if len(both) < 4 or any("confidence" not in receiver[item] and "error" not in receiver[item] for item in both):
        return None
    alone, together = (np.array([records[item]["correct"] for item in both]) for records in (receiver, fused))
    # An item that failed is one that the receiver is not sure of.
    confidence = np.array([receiver[item].get("confidence", 0.0) for item in both])
    order = np.argsort(confidence, kind="stable")
    curve = []
    for share in SHARES:
        fuses = np.zeros(len(both), dtype=bool)
        fuses[order[: round(share * len(both))]] = True
        curve.append([share, float(np.where(fuses, together, alone).mean())])
    halves = np.random.default_rng(seed).permutation(len(both)) % 2
    decided = np.zeros(len(both), dtype=bool)
    for half in (0, 1):
        other = halves != half
        threshold = _best_threshold(confidence[other], together[other] - alone[other])
        decided |= (halves == half) & (confidence <= threshold)
    correct = np.where(decided, together, alone)
    return {
        "num_items": len(both),
        "curve": curve,
        "calibrated": {
            "value": float(correct.mean()),
            "interval": list(accuracy_interval(correct.tolist())),
            "share_fused": float(decided.mean()),
        },
        "oracle": float(np.maximum(alone, together).mean()),
    }


def _best_threshold(confidence: np.ndarray, gains: np.ndarray) -> float:
    """Return the confidence up to which fusing gains most, in sum: half way to the next item's."""
    order = np.argsort(confidence, kind="stable")
    sums: Sequence[float] = np.concatenate([[0.0], np.cumsum(gains[order])]).tolist()
    bounds = np.concatenate([[-np.inf], confidence[order], [np.inf]])
    best = int(np.argmax(sums))
    return float(bounds[best] + bounds[best + 1]) / 2
