"""The page of the demo: its parts, and the page itself in a headless browser."""

import configparser
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import close_gates
from huggingface_hub import RepoCard
from tokenizers_for_tests import TEXT

NEEDS = "the page's tests need the extras `[demo-web]`, `[serve]` and `[test]`"
pytest.importorskip("gradio", reason=NEEDS)
pytest.importorskip("fastapi", reason=NEEDS)

from serving_for_tests import tiny_pair  # noqa: E402

from c2c_hf.demo.compare import (  # noqa: E402
    Answer,
    document_methods,
    encode_question,
    prefill_document,
    question_methods,
    stream,
)
from c2c_hf.demo.state_changes import StateChanges, measure_state_changes  # noqa: E402
from c2c_hf.demo.web import Pair, build_page, changes_as_html, launch  # noqa: E402

SPACE = Path(__file__).parents[2] / "examples" / "space"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def fusion() -> Pair:
    return Pair(*tiny_pair("fusion"))


@pytest.fixture(scope="module")
def memory() -> Pair:
    return Pair(*tiny_pair("memory"))


def test_every_method_streams_its_answer(fusion: Pair, memory: Pair) -> None:
    page, other = (prefill_document(*memory, text) for text in TEXT[:2])
    methods = {
        **question_methods(*fusion, QUESTION, 8, other_question="Why?"),
        **document_methods(*memory, QUESTION, page, other, 8, with_sharer=True),
    }
    assert set(methods) == {
        *("receiver", "sharer", "text to text", "C2C", "mismatched"),
        *("no document", "in the prompt", "memory slots", "another page"),
    }
    texts = {}
    for name, method in methods.items():
        *pieces, answer = stream(method)
        assert isinstance(answer, Answer) and "".join(pieces).strip() == answer.text
        assert 0 < answer.first_token_seconds <= answer.seconds and answer.num_tokens == 8
        assert answer.tokens_per_second > 0
        texts[name] = answer.text
    assert texts["C2C"] != texts["receiver"] and texts["mismatched"] != texts["C2C"]
    assert texts["memory slots"] != texts["another page"]


def test_a_closed_stream_stops_the_generation(fusion: Pair) -> None:
    calls = []
    forward = fusion.model.receiver.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion.model.receiver, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        pieces = stream(question_methods(*fusion, QUESTION, 200)["receiver"])
        next(pieces)
        pieces.close()
    assert len(calls) < 100


def test_changes_of_the_states(fusion: Pair, memory: Pair) -> None:
    inputs = encode_question(fusion.processor, QUESTION)
    changes = measure_state_changes(*fusion, inputs)
    rendered = fusion.processor.tokenizer.decode(inputs["input_ids"][0])
    assert "".join(word for word, _ in changes.words) == rendered
    by_word = {word.strip(): change for word, change in changes.words}
    assert by_word["capital"] > 0
    # The template's own tokens are aligned with none of the sharer's, and nothing in front of them is changed.
    assert changes.words[0][1] < 1e-5
    assert {name: len(layers) for name, layers in changes.layers.items()} == {"keys": 3, "values": 3}
    for name, layers in changes.layers.items():
        # Every fused position takes the states of a closed gate as they are; deeper ones may differ by what is below.
        assert changes.open_gates is not None and len(changes.open_gates[name]) == 3
        assert all(change > 0 for change, is_open in zip(layers, changes.open_gates[name], strict=True) if is_open)

    inputs = encode_question(memory.processor, QUESTION, sharer_context=TEXT[0])
    changes = measure_state_changes(*memory, inputs)
    assert "".join(word for word, _ in changes.words) == rendered, "the slots are left out"
    assert max(change for _, change in changes.words) > 0
    assert list(changes.layers) == ["values"] and changes.open_gates is None
    without = measure_state_changes(*memory, encode_question(memory.processor, QUESTION))
    assert max(change for _, change in without.words) < 1e-5


def test_closed_gates_change_nothing() -> None:
    model, processor = tiny_pair()
    changes = measure_state_changes(close_gates(model), processor, encode_question(processor, QUESTION))
    assert max(change for _, change in changes.words) < 1e-5
    assert changes.open_gates == {"keys": [False] * 3, "values": [False] * 3}


def test_words_are_text_on_the_page() -> None:
    shown = changes_as_html(
        StateChanges([("<script>", 0.5), (" & 北京", 1.0)], {"values": [0.0, 2.0]}, {"values": [False, True]})
    )
    assert "<script>" not in shown and "&lt;script&gt;" in shown and " &amp; 北京" in shown
    assert re.findall('class="(open|closed)"', shown) == ["closed", "open"]
    assert "0.85)" in shown and "0.00)" in shown


def test_the_page_answers_without_a_browser(fusion: Pair, memory: Pair, tmp_path: Path) -> None:
    """Every state that the page takes on, and its errors."""
    ask = next(fn for fn in build_page(fusion, memory).fns.values() if fn.api_name == "ask").fn
    *_, last = ask(QUESTION, "", None, 8)
    titles = [update["label"] for update in last[1:-1:2] if update["visible"]]
    assert titles == [
        *("Receiver alone", "Sharer alone", "Text-to-text: the sharer writes background", "C2C: fused cache"),
        "Control: C2C from another question",
    ]
    assert all("tokens, first after" in update["value"] for update in last[2:-1:2] if update["visible"])
    assert "What the sharer changed" in last[-1]
    (tmp_path / "page.txt").write_text(TEXT[0], encoding="utf-8")
    *_, last = ask(QUESTION, "", str(tmp_path / "page.txt"), 8)
    assert [update["visible"] for update in last[1:-1:2]] == [True] * 6
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text(" ")
    for arguments, message in (
        ((" ", "", None), "Write a question first"),
        ((QUESTION, "ship " * 300, None), "256"),
        ((QUESTION, "text", str(tmp_path / "page.txt")), "not both"),
        ((QUESTION, "", str(tmp_path / "bytes.txt")), "bytes.txt is not UTF-8 text"),
        ((QUESTION, "", str(tmp_path / "empty.txt")), "empty.txt is empty"),
    ):
        *_, last = ask(*arguments, 8)
        assert message in last[0] and 'role="alert"' in last[0]


@pytest.fixture
def browser_page(fusion: Pair, memory: Pair) -> Iterator[Any]:
    """The page in headless Chromium; requests to elsewhere fail and are listed in `elsewhere`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser's test needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the browser's test needs Chromium")
    page = build_page(fusion, memory)
    launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": 1280, "height": 1100})
            tab.set_default_timeout(120_000)
            tab.elsewhere = []

            def only_loopback(route: Any) -> None:
                if "127.0.0.1" in route.request.url or route.request.url.startswith(("data:", "blob:")):
                    route.continue_()
                else:
                    tab.elsewhere.append(route.request.url)
                    route.abort()

            tab.route("**/*", only_loopback)
            tab.goto(page.local_url)
            yield tab
            browser.close()
    finally:
        page.close()


@pytest.mark.slow
def test_the_page_in_a_browser(browser_page: Any, tmp_path: Path) -> None:
    """Load, ask, upload a document, an error, a narrow screen; screenshots in the test's folder."""
    tab = browser_page
    question, ask = tab.locator("#question textarea"), tab.locator("#ask")
    question.wait_for()
    question.fill(QUESTION)
    ask.click()
    tab.locator("#changes h3").wait_for()
    assert tab.locator("[id^=figures-]:visible").count() == 5
    tab.screenshot(path=tmp_path / "question.png", full_page=True)

    (tmp_path / "page.txt").write_text(TEXT[0], encoding="utf-8")
    tab.locator("#upload input[type=file]").set_input_files(tmp_path / "page.txt")
    tab.get_by_text("page.txt").first.wait_for()
    ask.click()
    tab.locator("#figures-5", has_text="tokens, first after").wait_for()
    tab.locator("#changes h3").wait_for()
    tab.screenshot(path=tmp_path / "document.png", full_page=True)

    question.fill(" ")
    ask.click()
    tab.locator("#notice", has_text="Write a question first.").wait_for()
    assert tab.locator("[id^=figures-]:visible").count() == 0
    tab.screenshot(path=tmp_path / "error.png", full_page=True)

    tab.set_viewport_size({"width": 390, "height": 844})
    question.fill(QUESTION)
    ask.click()
    tab.locator("#changes h3").wait_for()
    tab.screenshot(path=tmp_path / "narrow.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    # gradio's own script for embedded pages; nothing else is asked for outside.
    assert all("iframe-resizer" in url or "iframeResizer" in url for url in tab.elsewhere), tab.elsewhere


def test_the_space(fusion: Pair, memory: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its app builds the page, its requirements are the package's, its header is one that the Hub takes."""
    monkeypatch.setattr("c2c_hf.demo.web.load_pairs", lambda: (fusion, memory))
    assert runpy.run_path(str(SPACE / "app.py"))["page"].title == "Cache-to-Cache"
    setup = configparser.ConfigParser()
    setup.read(SPACE.parents[1] / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    needed = "".join((setup["options"]["install_requires"], extras["demo"], extras["demo-web"])).split()
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(needed)
    header = RepoCard.load(SPACE / "README.md", repo_type="space").data
    assert header.sdk == "gradio" and header.app_file == "app.py" and header.license == "apache-2.0"
    assert len(header.short_description) <= 60
