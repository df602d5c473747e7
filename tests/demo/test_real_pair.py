"""The real pair: receiver SmolLM2-135M-Instruct and sharer Gemma 3 270M, unlike in every respect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import close_gates
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.demo import questions

pytestmark = pytest.mark.real_pair

FLOAT32 = {"dtype": torch.float32}


def prompts() -> list[str]:
    """Twenty: English, Chinese, code, emoji, and the demo's questions."""
    path = Path(__file__).parents[1] / "data" / "alignment" / "alignment.json"
    texts = [item["prompt"] for item in json.loads(path.read_text(encoding="utf-8"))["items"]]
    return texts + [item["question"] for item in questions()]


@pytest.fixture(scope="module")
def pair(real_pair: tuple[str, str]) -> tuple[C2CForCausalLM, C2CProcessor]:
    """An open fuser of random weights, strong enough to change every answer.

    Not stronger: padding alone changes the real models' float32 logits by 6.5e-5, and a fuser amplifies that.
    """
    torch.manual_seed(0)
    model = C2CForCausalLM.from_receiver_and_sharers(
        *real_pair, FLOAT32, FLOAT32, fuser_hidden_size=64, fuser_intermediate_size=64
    )
    with torch.no_grad():
        for name, parameter in model.fuser.named_parameters():
            if "gate_logit" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "out_proj" in name:
                parameter.mul_(0.3)
    return model, C2CProcessor.from_receiver_and_sharers(*real_pair)


@pytest.fixture
def closed(pair: tuple[C2CForCausalLM, C2CProcessor]):
    model, processor = pair
    state = {name: value.clone() for name, value in model.fuser.state_dict().items()}
    yield close_gates(model), processor
    model.fuser.load_state_dict(state)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_closed_equals_the_receiver(closed: tuple[C2CForCausalLM, C2CProcessor]) -> None:
    """Twenty prompts: logits bit for bit those of the receiver run over the same chunks, and the same answers."""
    model, processor = closed
    texts = prompts()
    assert len(texts) == 20
    for text in texts:
        inputs = processor.apply_chat_template(chat(text))
        ids = inputs["input_ids"]
        split = int((inputs["sharer_alignment"][0] >= 0).nonzero().max()) + 1
        chunks = DynamicCache(config=model.receiver.config)
        with torch.no_grad():
            model.receiver(input_ids=ids[:, :split], use_cache=True, **{CACHE_ARGUMENT: chunks})
            tail = model.receiver(input_ids=ids[:, split:], use_cache=True, **{CACHE_ARGUMENT: chunks}).logits
            logits = model(**inputs, logits_to_keep=ids.shape[1] - split).logits
            assert torch.equal(logits, tail)
            expected = model.receiver.generate(ids, max_new_tokens=12, do_sample=False)
            assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
            with model.disable_fusion():
                assert torch.equal(model(**inputs).logits, model.receiver(input_ids=ids).logits)
                assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)


def test_padded_rows_equal_single_rows(pair: tuple[C2CForCausalLM, C2CProcessor]) -> None:
    """Eight unequal chats in one batch, prefill and 32 decoded tokens; prefill with padding on the right as well."""
    model, processor = pair
    texts = [text[: 20 + 37 * index] for index, text in enumerate(prompts()[4:12])]
    batch = processor.apply_chat_template([chat(text) for text in texts])
    assert len(set(batch["attention_mask"].sum(1).tolist())) >= 6
    kwargs = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    together = model.generate(**batch, **kwargs, output_logits=True, return_dict_in_generate=True)
    right = {name: _padded_right(batch, name) for name in ("input_ids", "attention_mask", "sharer_alignment")}
    with torch.no_grad():
        right_logits = model(
            **right,
            sharer_input_ids=batch["sharer_input_ids"],
            sharer_attention_mask=batch["sharer_attention_mask"],
        ).logits
    changed = 0
    for index, text in enumerate(texts):
        inputs = processor.apply_chat_template(chat(text))
        length = inputs["input_ids"].shape[1]
        single = model.generate(**inputs, **kwargs, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(together.sequences[index, -32:], single.sequences[0, -32:])
        batch_logits = torch.stack([step[index] for step in together.logits])
        _assert_close(batch_logits, torch.stack([step[0] for step in single.logits]))
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        _assert_close(right_logits[index, :length], logits)
        with model.disable_fusion():
            plain = model.generate(**inputs, **kwargs)
        changed += not torch.equal(plain, single.sequences)
    assert changed == len(texts), "fusion changes nothing, so nothing was compared"


def _padded_right(batch, name: str) -> torch.Tensor:
    rows = []
    for row, mask in zip(batch[name], batch["attention_mask"], strict=True):
        rows.append(torch.roll(row, -int((mask == 0).sum())))
    return torch.stack(rows)


def _assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


RELOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
import c2c_hf
folder, inputs, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder)
batch = processor.apply_chat_template([{"role": "user", "content": "Where does the river end?"}])
saved = torch.load(inputs, weights_only=True)
assert all(torch.equal(batch[name], value) for name, value in saved.items()), "the processor differs"
with torch.no_grad():
    assert torch.equal(model(**batch).logits, torch.load(logits, weights_only=True)), "the logits differ"
print("equal")
"""


def test_saved_folder(pair: tuple[C2CForCausalLM, C2CProcessor], tmp_path: Path) -> None:
    """Fuser, configuration and processor, nothing of the base models; a new process computes the same."""
    model, processor = pair
    folder = tmp_path / "fuser"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("fuser.") for name in file.keys())  # noqa: SIM118
    weights = sum(parameter.numel() for parameter in model.fuser.parameters())
    assert (folder / "model.safetensors").stat().st_size < 4 * weights + 100_000
    assert {path.name for path in folder.rglob("*.safetensors")} == {"model.safetensors"}
    inputs = processor.apply_chat_template(chat("Where does the river end?"))
    with torch.no_grad():
        torch.save(model(**inputs).logits, tmp_path / "logits.pt")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", RELOAD, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


def test_other_base_models_are_refused(
    pair: tuple[C2CForCausalLM, C2CProcessor], real_pair: tuple[str, str], tmp_path: Path
) -> None:
    model, _ = pair
    model.save_pretrained(tmp_path)
    receiver, sharer = real_pair
    with pytest.raises(ValueError, match=r"`receiver`: this fuser was made for a model with layer shapes .*30 x"):
        C2CForCausalLM.from_pretrained(tmp_path, receiver=sharer)
    other = AutoModelForCausalLM.from_pretrained(receiver, dtype=torch.float32)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="`receiver`: this fuser was made for a model with weights' fingerprint"):
        C2CForCausalLM.from_pretrained(tmp_path, receiver=other, dtype=torch.float32)


def test_states_beyond_the_sliding_window_are_fused(pair: tuple[C2CForCausalLM, C2CProcessor]) -> None:
    """Gemma's sliding layers see 512 tokens; states of the earliest of 700 are still there to fuse."""
    model, processor = pair
    text = " ".join(f"Line {number} of the long report." for number in range(100))
    inputs = processor(text)
    assert inputs["sharer_input_ids"].shape[1] > 600
    assert int((inputs["sharer_alignment"] >= 0).sum()) == inputs["input_ids"].shape[1] - 1
    with torch.no_grad():
        fused = model(**inputs, logits_to_keep=1).logits
        first_only = {**inputs, "sharer_alignment": inputs["sharer_alignment"].clone()}
        first_only["sharer_alignment"][:, 50:] = -1
        some = model(**first_only, logits_to_keep=1).logits
        with model.disable_fusion():
            plain = model(**inputs, logits_to_keep=1).logits
    assert torch.isfinite(fused).all()
    assert (some - plain).abs().max() > 1e-2
