"""What a written answer says: strictly, where it is nothing but an answer, and leniently, wherever it can be read."""

import re
from typing import Any

from .rows import LETTERS

# "The answer is B", "Answer: (B)", and the same in Chinese, at whose end no space separates words.
_SAID = re.compile(
    r"(?i:answer|choice|option)(?:\s+is|\s*[:：])[\s*(\[]*([A-J])(?![A-Za-z])"
    r"|(?:答案|正确选项|应选|选择|选)(?:是|为)?\s*[:：]?\s*[(（*]*([A-J])(?![A-Za-z])"
)
_MARKED = re.compile(r"^[\s*(\[（]*([A-J])(?:[*)\].:：、）]+(?=\s|$)|[ \t]*$)", re.MULTILINE)
_WRAPPED = re.compile(r"[(（\[*]+([A-J])[)）\]*]+")
# A lone A is more often an article.
_ALONE = re.compile(r"(?<![A-Za-z'])([B-J])(?![A-Za-z'])|(?<![A-Za-z'])(A)(?=\s*(?:[.,;:)\n]|$))")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def strict_letter(text: str, choices: list[str]) -> int | None:
    """Read a letter where the answer is one and nothing else, its choice's own words allowed behind it.

    Args:
        text: What a model wrote.
        choices: The choices in order.

    Returns:
        The index of the choice, or `None`.
    """
    match = re.fullmatch(r"\(?([A-J])\)?[.:)]?\s*(.*)", text.strip().strip("*"), re.DOTALL)
    if match is None or (index := LETTERS.index(match[1])) >= len(choices):
        return None
    rest = match[2].strip().strip(".").lower()
    return index if rest in ("", choices[index].strip().strip(".").lower()) else None


def lenient_letter(text: str, choices: list[str]) -> int | None:
    """Read the choice that a text settles on: a letter called the answer, marked or named, else one choice's words.

    Args:
        text: What a model wrote.
        choices: The choices in order.

    Returns:
        The index of the choice, or `None` where the text says none or several.
    """
    if (strict := strict_letter(text, choices)) is not None:
        return strict
    for pattern in (_SAID, _MARKED, _WRAPPED, _ALONE):
        found = [next(group for group in match.groups() if group) for match in pattern.finditer(text)]
        letters = [letter for letter in found if letter in LETTERS[: len(choices)]]
        if letters:
            return LETTERS.index(letters[0])
    said = [index for index, choice in enumerate(choices) if choice.strip() and choice.lower() in text.lower()]
    return said[0] if len(said) == 1 else None


def strict_number(text: str) -> str | None:
    """Read a number that stands alone or behind `####` or "the answer is"."""
    match = re.search(rf"(?:####|answer is:?|^)\s*({_NUMBER.pattern})\s*\.?\s*$", text.strip(), re.IGNORECASE)
    return _plain_number(match[1]) if match else None


def lenient_number(text: str) -> str | None:
    """Read the last number of a text."""
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def read_answer(doc: dict[str, Any], text: str) -> tuple[int | str | None, int | str | None]:
    """Read an answer strictly and leniently.

    Args:
        doc: A row, with `choices` and `answer`, or with `answers`.
        text: What a model wrote.

    Returns:
        The index of a choice, where the row has choices; a number, where all accepted answers are numbers; else the
        plain words, strictly of the whole text, leniently an accepted answer that occurs in it, or the whole text.
    """
    if "choices" in doc:
        return strict_letter(text, doc["choices"]), lenient_letter(text, doc["choices"])
    if _asks_for_number(doc):
        return strict_number(text), lenient_number(text)
    said = _plain_words(text)
    found = (accepted for accepted in map(_plain_words, doc["answers"]) if _occurs(accepted, said))
    return said or None, next(found, said) or None


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a written answer, as lm-evaluation-harness calls it for a task file.

    Args:
        doc: A row, with `choices` and `answer`, or with `answers`.
        results: The written text, alone.
    """
    if "choices" in doc:
        right = {doc["answer"]}
    else:
        right = set(map(_plain_number if _asks_for_number(doc) else _plain_words, doc["answers"]))
    strict, lenient = read_answer(doc, results[0])
    return {"strict": float(strict in right), "lenient": float(lenient in right)}


def _asks_for_number(doc: dict[str, Any]) -> bool:
    return all(_NUMBER.fullmatch(answer) for answer in doc["answers"])


def _plain_words(text: str) -> str:
    """Return a text without case, punctuation, English articles and spaces that do not separate words."""
    bare = re.sub(r"[^\w\s]|_", " ", text.lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def _occurs(accepted: str, said: str) -> bool:
    # Words where words are separated by spaces; Chinese ones are not.
    return bool(accepted) and (f" {accepted} " in f" {said} " or (not accepted.isascii() and accepted in said))


def _plain_number(text: str) -> str:
    number = text.replace(",", "").replace("$", "")
    return re.sub(r"\.0+$", "", number)
