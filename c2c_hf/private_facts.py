"""Private facts: made-up people and what they like, which no model can know unless somebody tells it.

Every context holds three facts of different kinds about three people; the question asks for one of them, and the
choices are ten values of that kind. Training and test share no name, no value and no wording.
"""

import random
from typing import Any

NUM_FACTS = 3
NUM_CHOICES = 10
SPLITS = ("train", "test")

_FIRST_NAMES = (
    "Adela Bram Celia Dario Elin Faris Greta Hugo Ines Jonas Kaia Lorenz Mira Nils Odile Pavel Quinn Rosa Stellan "
    "Tilda Umar Vera Wanda Xavier Yara Zeno Alma Boris Clara Dirk"
).split()
_LAST_NAMES = (
    "Abbott Brandt Castell Dreyer Eklund Farrow Galvin Hartog Ingram Jessen Keller Lindqvist Marlow Norden Okafor "
    "Pereira Quist Rowan Sandoval Thorne Ulrich Varga Whitlock Yilmaz Zamora Ashby Bellamy Corwin Dalby Ellery"
).split()
#: Kind of fact -> values of training, values of the test.
_KINDS = {
    "color": (
        "red silver beige maroon ivory teal crimson copper turquoise lavender bronze olive",
        "blue green black white yellow purple orange brown gray pink golden violet",
    ),
    "drink": (
        "cider vodka espresso punch sherry rum cocoa port whiskey champagne gin brandy",
        "tea coffee milk water juice beer wine lemonade soda cola broth cream",
    ),
    "animal": (
        "parrot hamster rabbit turtle snake goat ferret pigeon lizard mouse canary donkey",
        "dog cat horse goldfish duck frog spider sheep pony crow chicken owl",
    ),
    "instrument": (
        "cello harp tuba banjo oboe accordion clarinet trombone mandolin lute bassoon harmonica",
        "piano guitar violin drums flute trumpet organ bass horn whistle saxophone bells",
    ),
    "city": (
        "Lisbon Oslo Prague Dublin Naples Geneva Seville Riga Turin Bergen Porto Lyon",
        "Vienna Madrid Athens Cairo Boston Tokyo Berlin Dallas Sydney Delhi Lima Quebec",
    ),
    "sport": (
        "fencing rowing sailing archery judo surfing wrestling running diving climbing squash curling",
        "tennis golf soccer boxing hockey rugby chess skiing cricket baseball karate polo",
    ),
}
#: Statement, and question with the beginning of its answer. A small model answers what is put to it in such words.
_WORDINGS = {
    "train": (
        ("The {kind} that {name} likes best is {value}.", "Which {kind} does {name} like best?"),
        ("Of all things, the {kind} of choice for {name} is {value}.", "What is the {kind} of choice for {name}?"),
    ),
    "test": (("{name}'s favorite {kind} is {value}.", "What is {name}'s favorite {kind}?"),),
}


def private_facts(count: int, seed: int = 0, split: str = "test") -> list[dict[str, Any]]:
    """Make up questions about private facts.

    Args:
        count: Number of questions.
        seed: Of everything that is drawn.
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
    rng, half = random.Random(f"{split}-{seed}"), SPLITS.index(split)
    firsts, lasts = (names[half::2] for names in (_FIRST_NAMES, _LAST_NAMES))
    rows = []
    for index in range(count):
        kinds = rng.sample(sorted(_KINDS), NUM_FACTS)
        samples = (rng.sample(part, NUM_FACTS) for part in (firsts, lasts))
        names = [f"{first} {last}" for first, last in zip(*samples, strict=True)]
        choices = [rng.sample(_KINDS[kind][half].split(), NUM_CHOICES) for kind in kinds]
        statement, question = rng.choice(_WORDINGS[split])
        facts = [
            statement.format(name=name, kind=kind, value=values[0])
            for name, kind, values in zip(names, kinds, choices, strict=True)
        ]
        rng.shuffle(facts)
        # The first of the three is asked for; its place in the context is any.
        asked, answer = {"name": names[0], "kind": kinds[0]}, choices[0][0]
        begun = statement.format(**asked, value="").removesuffix(" .")
        rng.shuffle(choices[0])
        rows.append(
            {
                "id": f"{split}-{seed}-{index}",
                "sharer_context": " ".join(facts),
                "question": f"Question: {question.format(**asked)}\nAnswer: {begun}",
                "choices": choices[0],
                "answer": choices[0].index(answer),
            }
        )
    return rows
