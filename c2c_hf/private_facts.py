"""Private facts: made-up people and what is true of them, which no model can know unless somebody tells it.

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
#: Kind of fact -> (statements of training, statements of the test, questions of training, of the test, values).
_KINDS: dict[str, Any] = {
    "city": (
        ("{name} lives in {value}.", "The home of {name} is in {value}."),
        ("{name} has settled in {value}.", "These days {name} can be found in {value}."),
        ("Where does {name} live?", "In which city does {name} live?"),
        ("What is the home town of {name}?", "Which city has {name} settled in?"),
        "Lisbon Oslo Prague Dublin Naples Geneva Seville Riga Turin Bergen Porto Lyon "
        "Vienna Madrid Athens Cairo Boston Tokyo Berlin Dallas Sydney Delhi Lima Quebec",
    ),
    "job": (
        ("{name} works as a {value}.", "By trade {name} is a {value}."),
        ("{name} earns a living as a {value}.", "The occupation of {name} is {value}."),
        ("What does {name} do for a living?", "What is the job of {name}?"),
        ("What is the occupation of {name}?", "As what does {name} earn a living?"),
        "baker pilot lawyer farmer nurse tailor butcher sailor dentist miner plumber barber "
        "teacher painter doctor soldier writer singer actor banker carpenter chef judge gardener",
    ),
    "pet": (
        ("{name} keeps a {value} at home.", "The pet of {name} is a {value}."),
        ("{name} shares a house with a {value}.", "A {value} belongs to {name}."),
        ("What pet does {name} have?", "Which animal does {name} keep?"),
        ("Which animal belongs to {name}?", "With which animal does {name} share a house?"),
        "parrot hamster rabbit turtle snake goat ferret pigeon lizard mouse canary donkey "
        "dog cat horse goldfish duck frog spider sheep pony crow chicken owl",
    ),
    "color": (
        ("The car of {name} is {value}.", "{name} drives a {value} car."),
        ("{name} owns a car whose color is {value}.", "The color of {name}'s car is {value}."),
        ("What color is the car of {name}?", "Which color has the car that {name} drives?"),
        ("What is the color of {name}'s car?", "In which color does {name} own a car?"),
        "red silver beige maroon ivory teal crimson copper turquoise lavender bronze olive "
        "blue green black white yellow purple orange brown gray pink golden violet",
    ),
    "drink": (
        ("{name} always orders {value}.", "The drink that {name} likes best is {value}."),
        ("{name} never says no to {value}.", "A glass of {value} is what {name} prefers."),
        ("What does {name} always order?", "Which drink does {name} like best?"),
        ("To which drink does {name} never say no?", "What does {name} prefer to drink?"),
        "cider vodka espresso punch sherry rum cocoa port whiskey champagne gin brandy "
        "tea coffee milk water juice beer wine lemonade soda cola broth cream",
    ),
    "instrument": (
        ("{name} plays the {value}.", "{name} has learned the {value}."),
        ("{name} practices the {value} every day.", "The instrument of {name} is the {value}."),
        ("Which instrument does {name} play?", "What has {name} learned to play?"),
        ("Which instrument does {name} practice?", "What is the instrument of {name}?"),
        "cello harp tuba banjo oboe accordion clarinet trombone mandolin lute bassoon harmonica "
        "piano guitar violin drums flute trumpet organ bass horn whistle saxophone bells",
    ),
}


def private_facts(count: int, seed: int = 0, split: str = "test") -> list[dict[str, Any]]:
    """Make up questions about private facts.

    Args:
        count: Number of questions.
        seed: Of everything that is drawn.
        split: `"train"` or `"test"`, which share no name, value or wording.

    Returns:
        Rows of `id`, `sharer_context` (three facts), `question`, `choices` (ten values, in random order) and `answer`
        (index of the right one).

    Raises:
        ValueError: For an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but got {split!r}.")
    # Text seeds are hashed the same way in every process.
    rng, half = random.Random(f"{split}-{seed}"), SPLITS.index(split)
    firsts, lasts = (_part(names, half) for names in (_FIRST_NAMES, _LAST_NAMES))
    rows = []
    for index in range(count):
        kinds = [_KINDS[kind] for kind in rng.sample(sorted(_KINDS), NUM_FACTS)]
        samples = (rng.sample(part, NUM_FACTS) for part in (firsts, lasts))
        names = [f"{first} {last}" for first, last in zip(*samples, strict=True)]
        choices = [rng.sample(_part(kind[4].split(), half), NUM_CHOICES) for kind in kinds]
        facts = [
            rng.choice(kind[half]).format(name=name, value=values[0])
            for kind, name, values in zip(kinds, names, choices, strict=True)
        ]
        rng.shuffle(facts)
        # The first of the three is asked for; its place in the context is any.
        question, answer = rng.choice(kinds[0][2 + half]).format(name=names[0]), choices[0][0]
        rng.shuffle(choices[0])
        rows.append(
            {
                "id": f"{split}-{seed}-{index}",
                "sharer_context": " ".join(facts),
                "question": question,
                "choices": choices[0],
                "answer": choices[0].index(answer),
            }
        )
    return rows


def _part(values: list[str], half: int) -> list[str]:
    middle = len(values) // 2
    return values[:middle] if half == 0 else values[middle:]
