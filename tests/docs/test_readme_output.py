"""The answers that the README prints are those of the memory fuser on the real pair."""

import re
import shlex
from pathlib import Path

import pytest

from c2c_hf.demo import from_pretrained
from c2c_hf.demo.compare import answer_with_fusion, prefill_document

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.real_pair
def test_answers_from_memory_slots(real_pair: tuple[str, str]) -> None:
    words = shlex.split(re.search(r"^c2c demo --document .*$", README, re.MULTILINE)[0])
    questions = [words[index + 1] for index, word in enumerate(words) if word == "--question"]
    document = (ROOT / words[words.index("--document") + 1]).read_text(encoding="utf-8")
    printed = re.findall(r"^  memory slots +[\d.]+ s  (.*)$", README, re.MULTILINE)
    model, processor = from_pretrained("memory", dtype="float32")
    sharer_cache = prefill_document(model, processor, document).cache
    answers = [
        answer_with_fusion(model, processor, question, 32, sharer_context=document, sharer_cache=sharer_cache).text
        for question in questions
    ]
    assert answers == printed
