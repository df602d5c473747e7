"""Taught facts: nothing in a question says its answer, and training shares no person and no wording with the test."""

import re

import pytest

from c2c_hf.evaluation.tasks.taught_facts import (
    NUM_TEST_PEOPLE,
    NUM_VALUES,
    WORDINGS,
    fact_values,
    fuser_rows,
    taught_facts,
    taught_facts_generate,
    taught_people,
    teaching_rows,
)


def test_people() -> None:
    people = taught_people(1000)
    assert taught_people(300) == people[:300], "those of a smaller number are the first ones"
    names = {person[0].name for person in people}
    assert len(names) == 1000
    for kind, values in fact_values().items():
        assert len(set(values)) == NUM_VALUES
        counts = [sum(fact.value == value for person in people for fact in person) for value in values]
        assert min(counts) > 50, f"every {kind} is about as frequent"
    with pytest.raises(ValueError, match="`count` must be from 1 to 7644, but got 8000"):
        taught_people(8000)


def test_questions() -> None:
    rows = taught_facts(500)
    assert rows == taught_facts(500) != taught_facts(500, seed=1)
    known = {(fact.name, fact.kind): fact.value for person in taught_people(NUM_TEST_PEOPLE) for fact in person}
    assert len({(row["subject"], row["question"]) for row in rows}) == 500
    for row, written in zip(rows, taught_facts_generate(500), strict=True):
        answers = []
        for question, answer in (("question", "answer"), ("mismatched_question", "mismatched_answer")):
            (name,) = [name for name, kind in known if kind == row["subject"] and name in row[question]]
            answers.append((name, row["choices"][row[answer]]))
            assert known[name, row["subject"]] == row["choices"][row[answer]]
        (name, value), (other, other_value) = answers
        assert name != other and value != other_value
        assert row["question"].replace(name, other) == row["mismatched_question"]
        assert sorted(row["choices"]) == sorted(fact_values()[row["subject"]])
        assert "choices" not in written and written["question"] == row["question"]
        assert (written["answers"], written["mismatched_answer"]) == ([value], other_value)


def test_training_shares_nothing_with_the_test() -> None:
    def parts(prompts: list[str], names: set[str]) -> tuple[set[str], set[str]]:
        found = [(name, prompt) for prompt in prompts for name in re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+))", prompt)]
        found = [(name, prompt) for name, prompt in found if name in names]
        return {name for name, _ in found}, {prompt.replace(name, "_") for name, prompt in found}

    names = {person[0].name for person in taught_people(1000)}
    test_names, test_wordings = parts([row["question"] for row in taught_facts(600)], names)
    train_names, train_wordings = parts([row["prompt"] for row in fuser_rows(1000, 4)], names)
    taught_names, taught_wordings = parts([row["prompt"] for row in teaching_rows(1000, 4)], names)
    assert len(test_names) == NUM_TEST_PEOPLE and len(train_names) == 1000 - NUM_TEST_PEOPLE
    assert not test_names & train_names and taught_names == names
    assert len(test_wordings) == sum(len(own) for _, own in WORDINGS.values())
    assert not test_wordings & (train_wordings | taught_wordings)
    assert train_wordings <= taught_wordings


def test_rows_are_right() -> None:
    people = taught_people(300)
    known = {(fact.name, fact.kind): fact.value for person in people for fact in person}
    rows = [*teaching_rows(300, 2), *fuser_rows(300, 3)]
    assert len(rows) == 2 * 900 + 3 * 300
    kinds = {value: kind for kind, values in fact_values().items() for value in values}
    for row in rows:
        value = row["completion"].strip()
        names = re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+))", row["prompt"])
        assert [known[name, kinds[value]] for name in names if (name, kinds[value]) in known] == [value]
    with pytest.raises(ValueError, match="must be more than the 200 of the test"):
        fuser_rows(200)
