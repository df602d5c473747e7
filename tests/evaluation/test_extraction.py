"""Extraction of answers from generated text."""

import pytest

from c2c_hf.evaluation.tasks.extraction import extract_answer, score_answer

CHOICES = ["the sea", "a lake", "the desert", "nowhere"]


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("B", 1, 1),
        (" (B). ", 1, 1),
        ("**C**", 2, 2),
        ("D. nowhere", 3, 3),
        ("D. nowhere.", 3, 3),
        ("B. the sea", None, 1),
        ("The answer is B, since rivers end there.", None, 1),
        ("The correct answer is: (D)", None, 3),
        ("I think\nC) the desert\nfits", None, 2),
        ("A planet has many. The choice is **A**.", None, 0),
        ("答案是C。", None, 2),
        ("应选B", None, 1),
        ("It might be (A) but", None, 0),
        ("Rivers end in the sea.", None, 0),
        ("Either the sea or a lake.", None, None),
        ("A river ends somewhere.", None, None),
        ("E", None, None),
        ("I do not know.", None, None),
        ("", None, None),
    ],
)
def test_letters(text: str, strict: int | None, lenient: int | None) -> None:
    doc = {"choices": CHOICES, "answer": 1}
    assert extract_answer(doc, text) == (strict, lenient)
    assert score_answer(doc, [text]) == {"strict": float(strict == 1), "lenient": float(lenient == 1)}


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("18", "18", "18"),
        ("She has 3 eggs.\n#### 1,800", "1800", "1800"),
        ("The answer is $18.00.", "18", "18"),
        ("3 + 15 = 18 dollars", None, "18"),
        ("It is -2.5", None, "-2.5"),
        ("none", None, None),
    ],
)
def test_numbers(text: str, strict: str | None, lenient: str | None) -> None:
    doc = {"answers": ["18"]}
    assert extract_answer(doc, text) == (strict, lenient)
    assert score_answer(doc, [text]) == {"strict": float(strict == "18"), "lenient": float(lenient == "18")}


@pytest.mark.parametrize(
    ("text", "strict", "lenient", "right"),
    [
        ("The Hunter River.", "hunter river", "hunter river", (1, 1)),
        ("It is the Hunter\nRiver, I think", "it is hunter river i think", "hunter river", (0, 1)),
        ("hunter rivers", "hunter rivers", "hunter rivers", (0, 0)),
        ("应为77.3亿美元左右", "应为77 3亿美元左右", "77 3亿美元", (0, 1)),
        ("\n...", None, None, (0, 0)),
    ],
)
def test_words(text: str, strict: str | None, lenient: str | None, right: tuple[int, int]) -> None:
    doc = {"answers": ["Hunter River", "77.3亿美元。"]}
    assert extract_answer(doc, text) == (strict, lenient)
    assert score_answer(doc, [text]) == {"strict": right[0], "lenient": right[1]}
