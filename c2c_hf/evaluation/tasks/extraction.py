"""Extraction of an answer from generated text: strictly, where the text is the answer, or leniently, from any text."""

import re

from ..metrics.exact_match_f1 import normalize_answer
from .benchmark_data import LETTERS, Row

# "The answer is B", "Answer: (B)", and the same in Chinese, at whose end no space separates words.
_STATED = re.compile(
    r"(?i:answer|choice|option)(?:\s+is|\s*[:：])[\s*(\[]*([A-J])(?![A-Za-z])"
    r"|(?:答案|正确选项|应选|选择|选)(?:是|为)?\s*[:：]?\s*[(（*]*([A-J])(?![A-Za-z])"
)
_MARKED = re.compile(r"^[\s*(\[（]*([A-J])(?:[*)\].:：、）]+(?=\s|$)|[ \t]*$)", re.MULTILINE)
_WRAPPED = re.compile(r"[(（\[*]+([A-J])[)）\]*]+")
# A lone A is more often an article.
_BARE = re.compile(r"(?<![A-Za-z'])([B-J])(?![A-Za-z'])|(?<![A-Za-z'])(A)(?=\s*(?:[.,;:)\n]|$))")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def strict_letter(text: str, choices: list[str]) -> int | None:
    """Extract a letter from a text that is nothing else, except for its choice's words after the letter.

    Args:
        text: The generated text.
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
    """Extract a choice: a letter that is called the answer, marked or named, else the words of the only choice named.

    Args:
        text: The generated text.
        choices: The choices in order.

    Returns:
        The index of the choice, or `None` where the text names none or several.
    """
    if (strict := strict_letter(text, choices)) is not None:
        return strict
    for pattern in (_STATED, _MARKED, _WRAPPED, _BARE):
        found = [next(group for group in match.groups() if group) for match in pattern.finditer(text)]
        letters = [letter for letter in found if letter in LETTERS[: len(choices)]]
        if letters:
            return LETTERS.index(letters[0])
    named = [index for index, choice in enumerate(choices) if choice.strip() and choice.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def strict_number(text: str) -> str | None:
    """Extract a number that is the whole text or follows `####` or "the answer is" at its end."""
    match = re.search(rf"(?:####|answer is:?|^)\s*({_NUMBER.pattern})\s*\.?\s*$", text.strip(), re.IGNORECASE)
    return _plain_number(match[1]) if match else None


def lenient_number(text: str) -> str | None:
    """Extract the last number of a text."""
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def extract_answer(doc: Row, text: str) -> tuple[int | str | None, int | str | None]:
    """Extract an answer strictly and leniently.

    Args:
        doc: A row, with `choices` and `answer`, or with `answers`.
        text: The generated text.

    Returns:
        The strict and the lenient answer, each `None` where none is found: the index of a choice, where the row has
        choices; a number, where all accepted answers are numbers; else normalized words, strictly the whole text,
        leniently an accepted answer that occurs in it, or the whole text.
    """
    if "choices" in doc:
        return strict_letter(text, doc["choices"]), lenient_letter(text, doc["choices"])
    if asks_for_number(doc):
        return strict_number(text), lenient_number(text)
    words = normalize_answer(text)
    found = (accepted for accepted in map(normalize_answer, doc["answers"]) if _occurs(accepted, words))
    return words or None, next(found, words) or None


def score_answer(doc: Row, results: list[str]) -> dict[str, float]:
    """Score a generated answer: the `process_results` of the task files, called by lm-evaluation-harness.

    Args:
        doc: A row, with `choices` and `answer`, or with `answers`.
        results: The generated text, one element.

    Returns:
        `strict` and `lenient`: 1 where that extraction gives the right answer, else 0.
    """
    if "choices" in doc:
        right = {doc["answer"]}
    else:
        right = set(map(_plain_number if asks_for_number(doc) else normalize_answer, doc["answers"]))
    strict, lenient = extract_answer(doc, results[0])
    return {"strict": float(strict in right), "lenient": float(lenient in right)}


def asks_for_number(doc: Row) -> bool:
    """Return whether all accepted answers are numbers."""
    return all(_NUMBER.fullmatch(answer) for answer in doc["answers"])


def _occurs(accepted: str, words: str) -> bool:
    # Whole words, except in Chinese, which separates none by spaces.
    return bool(accepted) and (f" {accepted} " in f" {words} " or (not accepted.isascii() and accepted in words))


def _plain_number(text: str) -> str:
    number = text.replace(",", "").replace("$", "")
    return re.sub(r"\.0+$", "", number)
