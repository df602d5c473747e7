"""Private facts: the same in every run, answerable from the context only, and nothing shared by the splits."""

import re

import pytest

from c2c_hf.evaluation.tasks.private_facts import NUM_CHOICES, private_facts
from c2c_hf.evaluation.tasks.private_notes import private_notes


def test_rows() -> None:
    rows = private_facts(200, seed=3)
    assert rows == private_facts(200, seed=3) != private_facts(200, seed=4)
    for row in rows:
        answer = row["choices"][row["answer"]]
        assert len(set(row["choices"])) == NUM_CHOICES
        assert sum(choice in re.findall(r"\w+", row["sharer_context"]) for choice in row["choices"]) == 1
        (sentence,) = [s for s in row["sharer_context"].split(". ") if re.search(rf"\b{answer}\b", s)]
        name = re.search(r"[A-Z]\w+ [A-Z]\w+", row["question"])
        assert name is not None and name.group() in sentence, "the question's name is that of the fact"
    assert len({row["answer"] for row in rows}) == NUM_CHOICES


def test_splits_share_nothing() -> None:
    def words(split: str) -> tuple[set, set, set]:
        rows = private_facts(2000, split=split)
        names = {name for row in rows for name in re.findall(r"[A-Z]\w+ [A-Z]\w+", row["question"])}
        values = {choice for row in rows for choice in row["choices"]}
        wording = {re.sub("|".join(map(re.escape, names | values)), "_", row["question"]) for row in rows}
        return {part for name in names for part in name.split()}, values, wording

    for train, test in zip(words("train"), words("test"), strict=True):
        assert train and test and not train & test


def test_refused() -> None:
    with pytest.raises(ValueError, match="`split` must be one of"):
        private_facts(1, split="validation")


def test_notes_are_other_facts() -> None:
    """No name of `private_facts`; the answer is one word of the note, and no other choice is."""
    rows = private_notes(300, seed=3)
    assert rows == private_notes(300, seed=3) != private_notes(300, seed=4)
    facts = [row for split in ("train", "test") for row in private_facts(2000, split=split)]
    known = {word for row in facts for word in re.findall(r"\w+", row["sharer_context"])}
    for row in rows:
        assert len(set(row["choices"])) == NUM_CHOICES
        (found,) = [choice for choice in row["choices"] if choice in re.findall(r"\w+", row["sharer_context"])]
        assert row["choices"][row["answer"]] == found
        name = re.search(r"[A-Z]\w+ [A-Z]\w+", row["question"].partition(" ")[2])
        assert name is not None
        (sentence,) = [s for s in row["sharer_context"].split(". ") if name.group() in s]
        assert found in sentence
        assert not set(name.group().split()) & known
    assert len({row["answer"] for row in rows}) == NUM_CHOICES
