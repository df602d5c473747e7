"""Private notes: made-up facts as in `private_facts`, in other words, to test fusers that were trained on those.

Every context is a note about four people, in whole sentences that hold the fact anywhere; the question asks for one
word, and the choices are ten values of that kind. No name and no wording is that of `private_facts`.
"""

import random
from typing import Any

from .private_facts import draw_facts, facts_row

NUM_FACTS = 4

_FIRSTS = (
    "Amara Benedek Chiara Dmitri Elspeth Farid Gwendolyn Hiroshi Ilse Joaquin Katya Lorcan Mireille Nikhil Ophelia "
    "Pascoe Rosalind Santiago Tamsin Vikram"
).split()
_LASTS = (
    "Abernathy Bellweather Castellan Drummond Eastlake Fanshawe Galbraith Hathersage Inglewood Jarmusch Kettering "
    "Lockhart Merriweather Northcote Ormerod Pemberley Quillfeather Ravensworth Silvestri Thistlewood"
).split()
#: Per kind: sentences with the fact, the question, and the values.
_KINDS: dict[str, tuple[tuple[str, ...], str, list[str]]] = {
    "instrument": (
        (
            "Every evening {name} practises the {value} until the neighbours complain.",
            "The {value} belongs to {name}.",
        ),
        "Which instrument belongs to {name}?",
        "cello trumpet harp banjo flute oboe accordion clarinet mandolin tuba trombone bassoon".split(),
    ),
    "pet": (
        ("A {value} lives in the kitchen of {name}.", "When {name} travels, a cousin feeds the {value}."),
        "Which animal does {name} keep?",
        "parrot tortoise hamster rabbit ferret canary goldfish lizard hedgehog snake pony goat".split(),
    ),
    "month": (
        ("The wedding of {name} was in {value}, on a rainy day.", "Since {value}, {name} has been married."),
        "In which month did {name} marry?",
        "January February March April May June July August September October November December".split(),
    ),
    "material": (
        ("The house of {name}, built of {value}, stands by the lake.", "Out of {value}, {name} built a house."),
        "What is the house of {name} built of?",
        "brick granite timber clay steel glass concrete marble straw bamboo slate sandstone".split(),
    ),
    "dish": (
        ("On Sundays {name} cooks {value} for the whole street.", "Guests of {name} are always served {value}."),
        "Which dish does {name} cook?",
        "goulash lasagne paella curry risotto dumplings omelette casserole chili couscous borscht moussaka".split(),
    ),
    "sport": (
        ("Two broken ribs did not keep {name} from {value}.", "In {value}, {name} has won several cups."),
        "Which sport does {name} practise?",
        "fencing rowing archery judo sailing boxing skating wrestling badminton cycling climbing cricket".split(),
    ),
}


def private_notes(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Generate questions about private notes.

    Args:
        count: Number of questions.
        seed: Of all random draws.

    Returns:
        Rows of `id`, `sharer_context` (four facts), `question` (a whole prompt, which ends where the answer begins),
        `choices` (ten values, in random order) and `answer` (index of the right one).
    """
    # Text seeds are hashed the same way in every process.
    rng = random.Random(f"notes-{seed}")
    values = {kind: own for kind, (_, _, own) in _KINDS.items()}
    rows = []
    for index in range(count):
        kinds, names, choices = draw_facts(rng, _FIRSTS, _LASTS, values, NUM_FACTS)
        sentences = [
            rng.choice(_KINDS[kind][0]).format(name=name, value=own[0])
            for name, kind, own in zip(names, kinds, choices, strict=True)
        ]
        # The first of the four is asked for.
        prompt = f"{_KINDS[kinds[0]][1].format(name=names[0])} Answer with one word.\nAnswer:"
        rows.append(facts_row(rng, f"notes-{seed}-{index}", sentences, prompt, choices[0]))
    return rows
