"""Private facts: a benchmark of made-up people and their preferences, which a model can only take from the context.

Every context holds three facts of different kinds about three people; the question asks for one of them, and the
choices are ten values of that kind. Training and test share no name, no value and no wording; training has many more
of each, since a fuser trained on few words learns those words.
"""

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

NUM_FACTS = 3
NUM_CHOICES = 10
SPLITS = ("train", "test")


@cache
def known_words(split: str) -> dict[str, Any]:
    """Load the words of a split.

    `first_names`, `last_names` and per kind `values` are separated by spaces. `wordings` are pairs of a statement that
    ends with the value, and a question whose answer begins as the statement does: even a small model can complete it.
    """
    return json.loads(files(__package__).joinpath("private_facts.json").read_text(encoding="utf-8"))[split]


def private_facts(count: int, seed: int = 0, split: str = "test") -> list[dict[str, Any]]:
    """Generate questions about private facts.

    Args:
        count: Number of questions.
        seed: Of all random draws.
        split: `"train"` or `"test"`, which share no name, value or wording.

    Returns:
        Rows of `id`, `sharer_context` (three facts), `question` (a whole prompt, which ends with the beginning of the
        answer), `choices` (ten values, in random order) and `answer` (index of the right one).

    Raises:
        ValueError: For an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but got {split!r}.")
    # Text seeds are hashed the same way in every process.
    rng, words = random.Random(f"{split}-{seed}"), known_words(split)
    firsts, lasts = words["first_names"].split(), words["last_names"].split()
    values = {kind: own.split() for kind, own in words["values"].items()}
    rows = []
    for index in range(count):
        kinds, names, choices = draw_facts(rng, firsts, lasts, values, NUM_FACTS)
        statement, question = rng.choice(words["wordings"])
        facts = [
            statement.format(name=name, kind=kind, value=values[0])
            for name, kind, values in zip(names, kinds, choices, strict=True)
        ]
        # The first of the three is asked for.
        asked = {"name": names[0], "kind": kinds[0]}
        begun = statement.format(**asked, value="").removesuffix(" .")
        prompt = f"Question: {question.format(**asked)}\nAnswer: {begun}"
        rows.append(facts_row(rng, f"{split}-{seed}-{index}", facts, prompt, choices[0]))
    return rows


def draw_facts(
    rng: random.Random, firsts: Sequence[str], lasts: Sequence[str], values: Mapping[str, Sequence[str]], count: int
) -> tuple[list[str], list[str], list[list[str]]]:
    """Draw facts of different kinds about different people.

    Args:
        rng: Of the draws.
        firsts: First names.
        lasts: Last names.
        values: By kind.
        count: Number of facts.

    Returns:
        Per fact its kind, the person's name, and `NUM_CHOICES` values, of which the first one is the fact's.
    """
    kinds = rng.sample(sorted(values), count)
    samples = (rng.sample(part, count) for part in (firsts, lasts))
    names = [f"{first} {last}" for first, last in zip(*samples, strict=True)]
    return kinds, names, [rng.sample(values[kind], NUM_CHOICES) for kind in kinds]


def facts_row(rng: random.Random, row_id: str, facts: list[str], question: str, choices: list[str]) -> dict[str, Any]:
    """Make the row of a question about facts, which come in random order, as do its choices.

    Args:
        rng: Of the order.
        row_id: The row's id.
        facts: The statements.
        question: The whole prompt.
        choices: The right value first.
    """
    answer = choices[0]
    rng.shuffle(facts)
    rng.shuffle(choices)
    return {
        "id": row_id,
        "sharer_context": " ".join(facts),
        "question": question,
        "choices": choices,
        "answer": choices.index(answer),
    }
