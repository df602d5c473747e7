"""Model cards: metadata, description, results and licenses, and what they say where something is not known."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import close_gates, tiny_c2c
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from c2c_hf import C2CForCausalLM
from c2c_hf.checkpoints.describe import readable_size
from c2c_hf.checkpoints.fuser_weights import is_own_weight
from c2c_hf.hub import licenses
from c2c_hf.hub.licenses import BaseLicense, base_licenses, fuser_license
from c2c_hf.hub.model_card import render_model_card

RESULTS = [
    {"task": "arc_challenge", "method": "c2c", "metric": "accuracy", "value": 0.4321, "interval": [0.41, 0.45]},
    {"task": "arc_challenge", "method": "receiver", "metric": "accuracy", "value": 0.4, "interval": [0.38, 0.42]},
    {"task": "open|book", "method": "c2c", "metric": "accuracy", "value": 0.25, "interval": None},
]
#: Licenses as the cards on the Hub name them.
CARDS = {
    "Qwen/Qwen3-0.6B": "apache-2.0",
    "Qwen/Qwen3-1.7B": "apache-2.0",
    "Qwen/Qwen2.5-0.5B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-3B": "other",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "openai-community/gpt2": "mit",
    "google/gemma-3-270m": "gemma",
    "google/gemma-2-2b-it": "gemma",
    "meta-llama/Llama-3.2-1B": "llama3.2",
    "meta-llama/Llama-3.1-8B": "llama3.1",
    "me/without-a-license": None,
    "me/with-two": ["mit", "apache-2.0"],
}
GAIN = [{"task": "arc_challenge", "value": -0.0123, "interval": [-0.03, 0.01], "num_items": 1172}]


def model(receiver: str = "HuggingFaceTB/SmolLM2-135M-Instruct", sharers: tuple[str, ...] = ("Qwen/Qwen3-0.6B",)):
    built = tiny_c2c(sharers=["qwen3"] * len(sharers))
    built.config.receiver_name_or_path = receiver
    for sharer, name in zip(built.config.sharers, sharers, strict=True):
        sharer.name_or_path = name
    return built


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The Hub answers with `CARDS`; names and tokens of the requests."""
    asked: list[tuple[str, Any]] = []

    def model_info(name: str, token: Any = None) -> SimpleNamespace:
        asked.append((name, token))
        if name not in CARDS:
            raise HTTPError(f"no repository {name}")
        return SimpleNamespace(card_data=ModelCardData(license=CARDS[name]))

    monkeypatch.setattr(licenses, "model_info", model_info)
    return asked


def card(built: C2CForCausalLM, **kwargs: Any) -> ModelCard:
    weights = {name: value for name, value in built.state_dict().items() if is_own_weight(name)}
    return render_model_card(built.config, weights, base_licenses(built.config), "me/fuser", **kwargs)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    rows = [{**row, "num_items": 1172} for row in RESULTS]
    metrics = {"results": rows, "pairing_gain": GAIN, "versions": {"torch": "2"}, "seed": 0}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def section(rendered: ModelCard, title: str) -> str:
    return re.search(rf"## {title}\n(.*?)(\n## |\Z)", rendered.text, flags=re.DOTALL)[1]


def test_metadata(evaluation: Path) -> None:
    built = model()
    rendered = card(built, evaluation=evaluation, datasets=["allenai/ai2_arc"], tags=["tiny"])
    data = ModelCard(str(rendered)).data
    assert data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B"]
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("c2c_hf", "text-generation", "apache-2.0")
    assert data.datasets == ["allenai/ai2_arc"]
    assert data.tags == ["cache-to-cache", "c2c", "tiny"]
    assert data.model_name == "fuser"
    # Controls are no results of this model.
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in data.eval_results]
    assert found == [("arc_challenge", "accuracy", 0.4321), ("open|book", "accuracy", 0.25)]


def test_description_of_the_fuser() -> None:
    built = model(sharers=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"))
    built.config.receiver_revision = "a" * 40
    text = card(built).text
    weights = sum(parameter.numel() for parameter in built.fuser.parameters())
    assert f"({weights:,} weights, " in text
    assert f"| receiver | HuggingFaceTB/SmolLM2-135M-Instruct | llama | 3 | `{'a' * 40}` |" in text
    assert text.count("| sharer | Qwen/Qwen3-") == 2
    assert text.count("| not recorded |") == 2
    gates = torch.cat([p for name, p in built.named_parameters() if "gate_logit" in name]) > 0
    assert 0 < int(gates.sum()) < len(gates)
    assert f"{int(gates.sum())} of {len(gates)} gates are open" in text
    assert "0 of 12 gates are open, so the answers are the receiver's own" in card(close_gates(built)).text
    assert "Mode `fusion`, token alignment `identity`, `identity`, layer alignment `terminal`" in text


def test_description_of_a_memory_fuser() -> None:
    built = tiny_c2c(mode="memory", token_alignment="span")
    built.config.receiver_name_or_path = built.config.sharers[0].name_or_path = "Qwen/Qwen3-0.6B"
    text = card(built).text
    assert "into memory slots in the receiver's key/value cache" in text
    assert "Mode `memory`, token alignment `span`.\n" in text
    assert "gates" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "sharer_context=document" in code


def test_the_example_is_python(tmp_path: Path) -> None:
    for subfolder in (None, "general"):
        (code,) = re.findall(r"```python\n(.*?)```", card(model(), subfolder=subfolder).text, flags=re.DOTALL)
        compile(code, "card", "exec")
        assert len(code.splitlines()) <= 11
        assert ('subfolder="general"' in code) == (subfolder is not None)


def test_missing_evaluation_and_training_are_stated() -> None:
    rendered = card(model())
    assert rendered.data.eval_results is None
    assert "**None was run.**" in section(rendered, "Evaluation")
    assert "**Pairing gain: not measured.**" in section(rendered, "Evaluation")
    assert "**Not recorded.**" in section(rendered, "Training")


def test_results_controls_and_pairing_gain(evaluation: Path) -> None:
    text = section(card(model(), evaluation=evaluation), "Evaluation")
    assert "| arc_challenge | c2c | accuracy | 0.4321 | 0.4100 to 0.4500 | 1172 |" in text
    assert "| arc_challenge | receiver | accuracy | 0.4000 | 0.3800 to 0.4200 | 1172 |" in text
    assert "| open\\|book | c2c | accuracy | 0.2500 | not computed | 1172 |" in text
    assert "| arc_challenge | -0.0123 | -0.0300 to 0.0100 | 1172 |" in text
    assert "not measured" not in text
    assert "No control was run" not in text
    rows = [{**row, "num_items": 10} for row in RESULTS if row["method"] == "c2c"]
    (evaluation / "metrics.json").write_text(json.dumps({"results": rows}))
    text = section(card(model(), evaluation=evaluation), "Evaluation")
    assert "**No control was run**" in text
    assert "**Pairing gain: not measured.**" in text


def test_training() -> None:
    text = section(card(model(), training={"max_steps": 300, "train_data": "a|b\nc"}), "Training")
    assert "| `max_steps` | 300 |" in text
    assert "| `train_data` | a\\|b c |" in text
    assert "Not recorded" not in text


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"results": 3}',
        '{"results": [{"task": "a"}]}',
        '{"results": [{"task": "a", "method": "c2c", "metric": "accuracy", "value": "high", "num_items": 1}]}',
        '{"results": [{"task": 1, "method": "c2c", "metric": "accuracy", "value": 0.1, "num_items": 1}]}',
        '{"pairing_gain": [{"task": "a", "value": 0.1, "interval": [0.1], "num_items": 1}]}',
    ],
)
def test_damaged_metrics_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="`evaluation`: metrics.json is damaged or has another structure"):
        card(model(), evaluation=tmp_path)
    with pytest.raises(OSError, match=r"holds no metrics\.json; give a folder of `c2c evaluate`"):
        card(model(), evaluation=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "wished", "expected"),
    [
        (("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct"), None, "apache-2.0"),
        (("Qwen/Qwen3-0.6B", "openai-community/gpt2"), None, "apache-2.0"),
        (("Qwen/Qwen3-0.6B", "google/gemma-3-270m"), None, "gemma"),
        (("google/gemma-2-2b-it", "me/unknown"), None, "gemma"),
        (("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B-Instruct"), None, "llama3.2"),
        (("me/unknown", "Qwen/Qwen3-0.6B"), "mit", "mit"),
        (("me/unknown", "Qwen/Qwen3-0.6B"), None, "the card of me/unknown names none or cannot be read"),
        (("Qwen/Qwen2.5-3B", "Qwen/Qwen3-0.6B"), None, "the card of Qwen/Qwen2.5-3B names none or cannot be read"),
        (("me/without-a-license", "me/with-two"), None, "the card of me/without-a-license, me/with-two names none"),
        (("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"), None, "those of the base models differ: llama3.1, "),
        (("Qwen/Qwen3-0.6B", "google/gemma-3-270m"), "apache-2.0", "`license` must be 'gemma'"),
    ],
)
def test_licenses(names: tuple[str, str], wished: str | None, expected: str) -> None:
    bases = base_licenses(model(names[0], names[1:]).config)
    assert [base.name for base in bases] == list(names)
    if " " in expected:
        with pytest.raises(ValueError, match="`license` must be") as error:
            fuser_license(bases, wished)
        assert expected in str(error.value)
    else:
        assert fuser_license(bases, wished) == expected


def test_the_card_is_read_with_the_token(asked: list[tuple[str, Any]]) -> None:
    base_licenses(model().config, token="hf_mine")
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", "hf_mine"), ("Qwen/Qwen3-0.6B", "hf_mine")]


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), HTTPError("no route")])
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def model_info(name: str, token: Any = None) -> None:
        raise error

    monkeypatch.setattr(licenses, "model_info", model_info)
    names = ("Qwen/Qwen3-0.6B", "google/gemma-3-270m")
    built = model(names[0], names[1:])
    built.config.sharers[0].config.model_type = "gemma3_text"
    assert base_licenses(built.config) == [BaseLicense(names[0], None), BaseLicense(names[1], "gemma")]


def test_a_renamed_gemma_is_recognized() -> None:
    built = model(sharers=("me/renamed",))
    built.config.sharers[0].config.model_type = "gemma3_text"
    rendered = card(built)
    assert rendered.data.license == "gemma"
    assert "trained on the states of me/renamed and is a Model Derivative of Gemma." in rendered.text
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in rendered.text


def test_sizes() -> None:
    assert [readable_size(n) for n in (0, 36_748, 2_500_000, 3 * 10**9)] == ["0.0 kB", "36.7 kB", "2.5 MB", "3.0 GB"]
