"""The receiver layers that do best when they are fused alone, chosen on other items than those they answer."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from ..run_records import Record
from .registry import BEST_LAYERS, number_of, split_name


def single_layer_names(names: Sequence[str], num_layers: int) -> list[str]:
    """Return the methods by which layers are compared; none where no method of `names` compares them.

    Raises:
        ValueError: A method asks for more layers than there are.
    """
    wanted = [number_of(name, num_layers) for name in names if split_name(name)[0] == BEST_LAYERS]
    return [f"single_layer={layer}" for layer in range(num_layers)] if wanted else []


def choose_layers(records: Sequence[Record], task: str, items: set[str], count: int) -> list[int]:
    """Choose the layers that do best on other items.

    They are compared by the probability of the right choice among all, which says more than whether it is the highest;
    of generated answers by their correctness.

    Args:
        records: With those of [`single_layer_names`].
        task: The task.
        items: Of the task, by which the layers are compared.
        count: Number of layers.

    Returns:
        Them in ascending order.
    """
    qualities: defaultdict[int, list[float]] = defaultdict(list)
    for record in records:
        base, layer = split_name(record["method"])
        if base == "single_layer" and record["task"] == task and record["id"] in items:
            qualities[int(layer)].append(_quality(record))
    means = {layer: sum(values) / len(values) for layer, values in qualities.items()}
    return sorted(sorted(means, key=lambda layer: (-means[layer], layer))[:count])


def _quality(record: Record) -> float:
    if "scores" not in record:
        return float(record["correct"])
    means = torch.tensor(record["scores"]) / torch.tensor(record["num_tokens"])
    return float(means.softmax(0)[record["answer"]])
