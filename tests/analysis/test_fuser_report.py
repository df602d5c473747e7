"""The page of a fuser: complete, self-contained, and shown by a browser as it should be."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_for_tests import pair
from tokenizers_for_tests import TEXT

from c2c_hf import C2CForCausalLM
from c2c_hf.analysis.measures import effective_rank, linear_cka
from c2c_hf.analysis.states import collect_states

for extra in ("sklearn", "matplotlib"):
    pytest.importorskip(extra, reason="the analysis needs the extra `[analysis]`")

TEXTS = ["hello ships", *TEXT[:3]]
FIGURES = {
    "fusion": {"gates", "effective_rank", "similarity", "states", "change"},
    "memory": {"fit", "attention", "effective_rank", "similarity", "states", "change"},
}
MODES = sorted(FIGURES)


@pytest.fixture(scope="module", params=MODES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    from c2c_hf.analysis.fuser_report import analyze_fuser

    folder = tmp_path_factory.mktemp(request.param) / "report"
    model, processor = pair(mode=request.param)
    return request.param, analyze_fuser(model, processor, TEXTS, folder, "my <fuser>"), folder


def test_files(page: tuple[str, dict, Path]) -> None:
    mode, report, folder = page
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "report.json", *(f"{name}.png" for name in FIGURES[mode])}
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "my &lt;fuser&gt;" in html
    loaded = re.findall(r"(?:src|href)=\"([^\"]{0,40})", html)
    assert len(loaded) == len(FIGURES[mode]) + 2
    assert all(place.startswith("data:") or place == "report.json" for place in loaded)


def test_numbers(page: tuple[str, dict, Path]) -> None:
    mode, report, _ = page
    model, processor = pair(mode=mode)
    (states,) = collect_states(model, processor, TEXTS)
    (sharer,) = report["sharers"]
    assert report["num_tokens"] == len(states.token_ids)
    open_entries = [entry for entry, projected in enumerate(states.projected) if projected is not None]
    for entry in open_entries:
        kind, layer_idx = ("keys", entry) if entry < 3 else ("values", entry - 3)
        rank = sharer["effective_rank"]["projected"][kind][layer_idx]
        assert rank == pytest.approx(effective_rank(states.projected[entry]), rel=1e-3)
        cka = sharer["similarity"]["cka"]["projected"][kind][layer_idx]
        assert cka == pytest.approx(linear_cka(states.projected[entry], states.receiver[entry]), rel=1e-3)
    # The first text is a title only.
    place = slice(states.lengths[0], states.lengths[0] + states.lengths[1])
    assert "".join(sharer["change"]["tokens"]).strip() in TEXT[0]
    change = (states.fused[3][place] - states.receiver[3][place]).norm(dim=-1) / states.receiver[3][place].norm(dim=-1)
    assert torch.allclose(torch.tensor(sharer["change"]["values"][0]), change, rtol=1e-3)
    if mode == "memory":
        truth, slots = states.receiver[0], states.fused[0]
        r2 = 1 - (truth - slots).square().sum(0) / (truth - truth.mean(0)).square().sum(0)
        assert sharer["fit"]["keys"][0] == pytest.approx(float(r2.mean()), rel=1e-3)
        assert sharer["attention"]["tokens"] == sharer["change"]["tokens"]
    else:
        assert sharer["gates"]["keys"] + sharer["gates"]["values"] == [
            int(entry in open_entries) for entry in range(len(states.projected))
        ]
        assert [value is None for value in sharer["effective_rank"]["projected"]["keys"]] == [
            gate == 0 for gate in sharer["gates"]["keys"]
        ]


def test_several_sharers_have_figures_of_their_own(tmp_path: Path) -> None:
    from c2c_hf.analysis.fuser_report import analyze_fuser

    model, processor = pair(sharers=2)
    report = analyze_fuser(model, processor, TEXT[:1], tmp_path)
    assert len(report["sharers"]) == 2
    assert {path.name for path in tmp_path.glob("*gates.png")} == {"sharer_0_gates.png", "sharer_1_gates.png"}


def test_no_such_layer(tmp_path: Path) -> None:
    from c2c_hf.analysis.fuser_report import analyze_fuser

    model: C2CForCausalLM
    model, processor = pair()
    with pytest.raises(ValueError, match="`layer` must be from 0 to 2, but got 3"):
        analyze_fuser(model, processor, TEXT[:1], tmp_path, layer=3)


@pytest.mark.slow
def test_a_browser_shows_the_page(page: tuple[str, dict, Path]) -> None:
    """Every figure is drawn, nothing is wider than a telephone, the words change with the controls, no errors."""
    selenium = pytest.importorskip("selenium.webdriver", reason="the test drives a browser by selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("the test needs a browser: Debian's packages chromium and chromium-driver")
    from selenium.webdriver.chrome.service import Service

    mode, report, folder = page
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with selenium.Chrome(options=options, service=Service(driver)) as shown:
        shown.set_window_size(400, 900)
        shown.get((folder / "index.html").as_uri())
        widths = shown.execute_script("return [...document.images].map(image => image.naturalWidth)")
        assert len(widths) == len(FIGURES[mode]) and min(widths) > 100
        page_width, window = shown.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert page_width <= window, "the page scrolls sideways"
        (sharer,) = report["sharers"]
        colors = "return [...document.querySelectorAll('#words0 span')].map(word => word.style.background)"
        mean = shown.execute_script(colors)
        assert len(mean) == len(sharer["change"]["tokens"]) and len(set(mean)) > 1
        assert "mean of all layers" in shown.find_element("id", "shown0").text
        choices = [option.text for option in shown.find_elements("css selector", "#measure0 option")]
        assert choices[:2] == ["change of the values", "change of the keys"]
        assert len(choices) == (4 if mode == "memory" else 2)
        slider = shown.find_element("id", "layer0")
        slider.send_keys("\ue014")  # the right arrow
        first = sharer["change"]["values"][0]
        assert shown.find_element("id", "shown0").text == f"layer 0, darkest: {max(first):#.3g}"
        assert shown.execute_script(colors) != mean
        select = shown.find_element("id", "measure0")
        select.send_keys("change of the keys")
        assert f"{max(sharer['change']['keys'][0]):#.3g}" in shown.find_element("id", "shown0").text
        assert not shown.get_log("browser")
        asked = re.findall(
            r'"url":"(\w+):',
            json.dumps([entry["message"] for entry in shown.get_log("performance")]).replace("\\", ""),
        )
        assert set(asked) <= {"file", "data"}, "something comes from elsewhere"
