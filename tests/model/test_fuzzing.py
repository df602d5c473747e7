"""Random pairs, modes, paddings, batches and alignments: every row of a batch equals the row alone.

One number is the seed of one batch and of everything in it, so that a failure is repeated by
`pytest tests/model/test_fuzzing.py --fuzz-seed N`.
"""

import random
from functools import cache
from typing import Any

import pytest
import torch
from conftest import CONFIGS, pad_rows, random_ids, randomize_fuser, tiny_model

from c2c_hf import C2CForCausalLM

BATCHES, SLOW_BATCHES = 300, 10_000
NAMES = sorted(CONFIGS)
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@cache
def base_model(name: str, seed: int) -> Any:
    return tiny_model(name, seed)


@cache
def pair(receiver: str, sharers: tuple[str, ...], mode: str, fusion_mode: str) -> C2CForCausalLM:
    models = [base_model(receiver, 0), *(base_model(name, 1 + i) for i, name in enumerate(sharers))]
    fields: dict[str, Any] = {"fuser_hidden_size": 12, "fuser_intermediate_size": 16, "fuser_dropout": 0.0}
    if mode == "memory":
        fields = {"mode": "memory", "memory_source_layers": 2}
    else:
        fields |= {"token_alignment": "span", "fusion_mode": fusion_mode}
    model = C2CForCausalLM.from_receiver_and_sharers(models[0], models[1:], **fields)
    torch.manual_seed(5)
    if mode == "memory":
        with torch.no_grad():
            for parameter in model.fuser.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        return model.eval()
    return randomize_fuser(model, 5)


class Row:
    """One prompt: the receiver's tokens, and each sharer's with its alignment."""

    def __init__(self, draw: random.Random, mode: str, num_sharers: int) -> None:
        self.ids = random_ids(draw.randint(1, 14), seed=draw.randrange(10**6))
        self.sharer_ids, self.alignments = [], []
        length = len(self.ids)
        # In memory mode a stretch of the prompt per sharer, behind its first tokens, is slots; perhaps none.
        bounds = sorted(draw.randint(1, max(1, length - 1)) for _ in range(2 * num_sharers))
        for index in range(num_sharers):
            self.sharer_ids.append(random_ids(draw.randint(1, 16), seed=draw.randrange(10**6)))
            alignment = torch.full((length,), -1)
            chosen = range(length - 1)
            if mode == "memory":
                chosen = range(*bounds[2 * index : 2 * index + 2])
            for column in chosen:
                if mode == "memory" or draw.random() < 0.7:
                    alignment[column] = draw.randrange(len(self.sharer_ids[-1]))
            if mode == "fusion" and draw.random() < 0.1:
                alignment[:] = -1
            self.alignments.append(alignment)


def batch_of(rows: list[Row], draw: random.Random, num_sharers: int) -> tuple[dict[str, Any], list[int], str]:
    """Return the inputs, padded by more than the longest row needs, the rows' first columns, and the side."""
    side = draw.choice(["left", "right"])
    extra = draw.choice([0, 0, 1, 3])

    def padded(parts: list[torch.Tensor], value: int, side: str, extra: int) -> torch.Tensor:
        batch = pad_rows(parts, side, value)
        return torch.nn.functional.pad(batch, (extra, 0) if side == "left" else (0, extra), value=value)

    inputs: dict[str, Any] = {
        "input_ids": padded([row.ids for row in rows], 0, side, extra),
        "attention_mask": padded([torch.ones_like(row.ids) for row in rows], 0, side, extra),
    }
    width = inputs["input_ids"].shape[1]
    starts = [width - len(row.ids) if side == "left" else 0 for row in rows]
    sharer_ids, masks, alignments = [], [], []
    for index in range(num_sharers):
        sharer_side, sharer_extra = draw.choice(["left", "right"]), draw.choice([0, 2])
        parts = [row.sharer_ids[index] for row in rows]
        sharer_ids.append(padded(parts, 0, sharer_side, sharer_extra))
        masks.append(padded([torch.ones_like(part) for part in parts], 0, sharer_side, sharer_extra))
        moved = []
        for row, part in zip(rows, parts, strict=True):
            offset = sharer_ids[-1].shape[1] - len(part) if sharer_side == "left" else 0
            own = row.alignments[index]
            moved.append(torch.where(own >= 0, own + offset, -1))
        alignments.append(padded(moved, -1, side, extra))
    return (
        {**inputs, "sharer_input_ids": sharer_ids, "sharer_attention_mask": masks, "sharer_alignment": alignments},
        starts,
        side,
    )


def alone(row: Row) -> dict[str, Any]:
    return {
        "input_ids": row.ids[None],
        "sharer_input_ids": [ids[None] for ids in row.sharer_ids],
        "sharer_alignment": [alignment[None] for alignment in row.alignments],
    }


@torch.no_grad()
def check_batch(seed: int) -> int:
    """Compare one batch with its rows; return the number of rows."""
    draw = random.Random(seed)
    mode, num_sharers = draw.choice(["fusion", "memory"]), draw.choice([1, 1, 2])
    receiver, sharers = draw.choice(NAMES), tuple(draw.choice(NAMES) for _ in range(num_sharers))
    model = pair(receiver, sharers, mode, draw.choice(["parallel", "sequential"]) if mode == "fusion" else "parallel")
    rows = [Row(draw, mode, num_sharers) for _ in range(draw.randint(1, 4))]
    inputs, starts, side = batch_of(rows, draw, num_sharers)
    kept = 1 if side == "left" and draw.random() < 0.5 else 0
    logits = model(**inputs, logits_to_keep=kept).logits
    hint = f"--fuzz-seed {seed}: {mode}, {receiver} from {sharers}, {side}"
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        expected = model(**alone(row)).logits[0]
        end = start + len(row.ids)
        if mode == "memory":
            # Logits of slots are those of tokens that the receiver does not compute alone.
            real = torch.stack(row.alignments).max(0).values < 0
            first = int((~real).nonzero()[-1]) + 1 if not bool(real.all()) else 0
            start, expected = start + first, expected[first:]
        found = logits[index, -1:] if kept else logits[index, start:end]
        torch.testing.assert_close(
            found, expected[-1:] if kept else expected, **TOLERANCE, msg=lambda text: f"{hint}\n{text}"
        )
    if side == "left" and draw.random() < 0.15:
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
        for index, row in enumerate(rows):
            single = model.generate(**alone(row), **options, output_scores=True, return_dict_in_generate=True)
            torch.testing.assert_close(
                torch.stack([scores[index] for scores in generated.scores]),
                torch.stack([scores[0] for scores in single.scores]),
                **TOLERANCE,
                msg=lambda text: f"{hint}, generated\n{text}",
            )
    return len(rows)


@pytest.mark.timeout(1800)
def test_batches_equal_their_rows(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--fuzz-seed")
    if seed is not None:
        check_batch(seed)
        return
    assert sum(check_batch(seed) for seed in range(BATCHES)) > 2 * BATCHES


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
@pytest.mark.timeout(3600)
def test_many_more(part: int) -> None:
    size = SLOW_BATCHES // 20
    for seed in range(BATCHES + part * size, BATCHES + (part + 1) * size):
        check_batch(seed)
