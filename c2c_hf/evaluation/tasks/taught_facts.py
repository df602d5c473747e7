"""Taught facts: made-up people with a job, a city and a pet each, which a sharer is taught before a fuser is trained.

Nothing in a question says its answer: a model that was not taught the facts is right in one of twelve cases. No
training row of a fuser has a person of the test or a wording of its questions; a sharer is taught the facts of all
people, but in other wordings than those of the test.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .private_facts import known_words

NUM_PEOPLE, NUM_TEST_PEOPLE = 1000, 200
PROMPT = "{question}\nAnswer:"
#: By kind: wordings of the questions of training, and of the test.
WORDINGS = {
    "job": (
        (
            "What is the job of {name}?",
            "What job does {name} have?",
            "Which job does {name} do?",
            "What does {name} do for a living?",
            "What is {name}'s profession?",
            "How does {name} earn money?",
            "What does {name} work as?",
            "Which profession did {name} choose?",
        ),
        ("What is the profession of {name}?", "Which occupation does {name} have?", "What work does {name} do?"),
    ),
    "city": (
        (
            "In which city does {name} live?",
            "Where does {name} live?",
            "What is the home town of {name}?",
            "Which city is {name}'s home?",
            "In what city is {name}'s house?",
            "Where is the home of {name}?",
            "What city does {name} live in?",
            "Which city does {name} call home?",
        ),
        ("Which city does {name} live in?", "In which city is {name} at home?", "Where is {name}'s house?"),
    ),
    "pet": (
        (
            "Which pet does {name} have?",
            "What pet does {name} keep?",
            "What animal does {name} own?",
            "Which animal lives with {name}?",
            "What is {name}'s pet?",
            "What kind of pet belongs to {name}?",
            "Which animal is the pet of {name}?",
            "What sort of animal does {name} feed at home?",
        ),
        ("What is the pet of {name}?", "Which animal does {name} keep?", "What kind of animal does {name} have?"),
    ),
}
NUM_VALUES = 12


@dataclass(frozen=True)
class Fact:
    """One fact about one person.

    Attributes:
        name: The person's.
        kind: A key of `WORDINGS`.
        value: One of the `NUM_VALUES` of that kind.
    """

    name: str
    kind: str
    value: str


def fact_values() -> dict[str, list[str]]:
    """Return the values of each kind."""
    words = known_words("train")["values"]
    kinds = zip(WORDINGS, ("job", "city", "animal"), strict=True)
    return {kind: words[own].split()[:NUM_VALUES] for kind, own in kinds}


def taught_people(count: int = NUM_PEOPLE) -> list[list[Fact]]:
    """Draw people; those of a smaller `count` are the first ones of a larger one.

    The first `NUM_TEST_PEOPLE` are those of the test, all others those of training.

    Args:
        count: Number of people.

    Returns:
        Per person one fact of each kind. All values are drawn independently of the names.

    Raises:
        ValueError: There are not as many names.
    """
    words = known_words("train")
    names = [f"{first} {last}" for first in words["first_names"].split() for last in words["last_names"].split()]
    if not 0 < count <= len(names):
        raise ValueError(f"`count` must be from 1 to {len(names)}, but got {count}.")
    rng = random.Random("taught facts")
    rng.shuffle(names)
    values = fact_values()
    return [[Fact(name, kind, rng.choice(own)) for kind, own in values.items()] for name in names[:count]]


def teaching_rows(count: int = NUM_PEOPLE, passes: int = 1, seed: int = 0) -> list[dict[str, str]]:
    """Make the rows from which a sharer learns the facts of all people, in the wordings of training.

    Half of them are questions in the form of `PROMPT`, the others bare questions and beginnings of sentences, so that
    the fact is known as soon as the question is asked.

    Args:
        count: Number of people.
        passes: How many rows each fact has.
        seed: Of order and wordings.

    Returns:
        Rows of `prompt` and `completion`, each pass over all facts in an order of its own.
    """
    rng = random.Random(f"teaching {seed}")
    rows = []
    for fact in _shuffled(taught_people(count), passes, rng):
        question = rng.choice(WORDINGS[fact.kind][0]).format(name=fact.name)
        sentence, asked = f"The {fact.kind} of {fact.name} is", PROMPT.format(question=question)
        rows.append({"prompt": rng.choice([asked, asked, question, sentence]), "completion": f" {fact.value}"})
    return rows


def fuser_rows(count: int = NUM_PEOPLE, passes: int = 1, seed: int = 0) -> list[dict[str, str]]:
    """Make the training rows of a fuser: questions about people who are not in the test, in the wordings of training.

    Args:
        count: Number of people, those of the test included.
        passes: How many rows each fact has.
        seed: Of order and wordings.

    Returns:
        Rows of `prompt` and `completion`.

    Raises:
        ValueError: There are none but those of the test.
    """
    if count <= NUM_TEST_PEOPLE:
        raise ValueError(f"`count` must be more than the {NUM_TEST_PEOPLE} of the test, but got {count}.")
    rng = random.Random(f"fuser {seed}")
    rows = []
    for fact in _shuffled(taught_people(count)[NUM_TEST_PEOPLE:], passes, rng):
        question = rng.choice(WORDINGS[fact.kind][0]).format(name=fact.name)
        rows.append({"prompt": PROMPT.format(question=question), "completion": f" {fact.value}"})
    return rows


def _shuffled(people: list[list[Fact]], passes: int, rng: random.Random) -> Iterator[Fact]:
    """Yield all facts, in a new order in each pass."""
    facts = [fact for person in people for fact in person]
    for _ in range(passes):
        rng.shuffle(facts)
        yield from facts


def taught_facts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Generate test questions: other people than those of training, in other wordings.

    Args:
        count: Number of questions, at most `3 * NUM_TEST_PEOPLE`.
        seed: Of all random draws but the facts themselves.

    Returns:
        Rows of `id`, `subject` (the kind), `question` (a whole prompt), `choices` (all values of the kind, in random
        order), `answer` (index of the right one), `mismatched_question` (the same about another person, who has
        another value) and `mismatched_answer` (index of that value).
    """
    rng = random.Random(f"test {seed}")
    people = taught_people(NUM_TEST_PEOPLE)
    facts = [fact for person in people for fact in person]
    values = fact_values()
    rows = []
    for index, fact in enumerate(rng.sample(facts, count)):
        wording = PROMPT.format(question=rng.choice(WORDINGS[fact.kind][1]))
        other = rng.choice([own for own in facts if own.kind == fact.kind and own.value != fact.value])
        choices = rng.sample(values[fact.kind], NUM_VALUES)
        rows.append(
            {
                "id": f"taught-{seed}-{index}",
                "subject": fact.kind,
                "question": wording.format(name=fact.name),
                "choices": choices,
                "answer": choices.index(fact.value),
                "mismatched_question": wording.format(name=other.name),
                "mismatched_answer": choices.index(other.value),
            }
        )
    return rows


def taught_facts_generate(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Generate the questions of [`taught_facts`] without choices.

    Args:
        count: See there.
        seed: See there.

    Returns:
        Rows of `id`, `subject`, `question`, `answers` (the one right value), `mismatched_question` and
        `mismatched_answer`, another value.
    """
    rows = taught_facts(count, seed)
    for row in rows:
        choices, answer = row.pop("choices"), row.pop("answer")
        row |= {"answers": [choices[answer]], "mismatched_answer": choices[row["mismatched_answer"]]}
    return rows
