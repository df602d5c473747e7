"""Chosen tokens of cached states, by slice or by index, and changes of them."""

import pytest
import torch

from c2c_hf.inference.fusion import TokenStates

#: Chosen tokens in three rows of five: (rows, positions), and whether one slice holds them all.
CHOICES = {
    "same columns": ([0, 0, 1, 1, 2, 2], [1, 2, 1, 2, 1, 2], True),
    "all": ([0] * 5 + [1] * 5 + [2] * 5, list(range(5)) * 3, True),
    "other columns in a row": ([0, 0, 1, 1, 2, 2], [1, 2, 2, 3, 1, 2], False),
    "a gap": ([0, 0, 1, 1, 2, 2], [1, 3, 1, 3, 1, 3], False),
    "backwards": ([0, 0, 1, 1, 2, 2], [2, 1, 2, 1, 2, 1], False),
    "a row missing": ([0, 0, 0, 2, 2, 2], [1, 2, 3, 1, 2, 3], False),
    "rows swapped": ([1, 1, 0, 0, 2, 2], [1, 2, 1, 2, 1, 2], False),
    "fewer than rows": ([0], [4], False),
    "none": ([], [], False),
}


def entries() -> list[torch.Tensor]:
    """Two entries of unequal heads; each number says entry, row, head, position and dimension."""
    shapes = [(3, 2, 5, 4), (3, 1, 5, 6)]
    return [torch.arange(1000 * i, 1000 * i + torch.Size(shape).numel()).view(shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("choice", CHOICES)
def test_tokens_are_those_chosen(choice: str) -> None:
    rows, positions, sliced = CHOICES[choice]
    states = entries()
    tokens = TokenStates(states, torch.tensor(rows).long(), torch.tensor(positions).long(), torch.device("cpu"))
    assert (tokens._columns is not None) == sliced
    assert len(tokens) == len(rows)
    for index, entry in enumerate(states):
        mine = tokens.entry(index)
        assert torch.equal(tokens.gather([index, index]), torch.stack([mine, mine]))
        assert mine.shape == (len(rows), entry.shape[1] * entry.shape[3])
        expected = [entry[row, :, position].flatten().tolist() for row, position in zip(rows, positions, strict=True)]
        assert mine.tolist() == expected


@pytest.mark.parametrize("choice", CHOICES)
def test_a_change_is_added_there_and_nowhere_else(choice: str) -> None:
    rows, positions, _ = CHOICES[choice]
    states, before = entries(), entries()
    tokens = TokenStates(states, torch.tensor(rows).long(), torch.tensor(positions).long())
    change = torch.arange(1, 8 * len(rows) + 1).view(-1, 8)
    tokens.add([0], change[None])
    for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
        before[0][row, :, position] += change[index].view(2, 4)
    assert torch.equal(states[0], before[0])
    assert torch.equal(states[1], before[1])
