"""Base models in different precisions, with different attention, mapped and offloaded: what a processor can show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import randomize_fuser, save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf._compat import CACHE_ARGUMENT

MODES, ROLES = ["fusion", "memory"], ["receiver", "sharer"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


class Saved:
    """A fuser's folder, and what it answers with both base models as they are."""

    def __init__(self, folder: Path, mode: str) -> None:
        names = [
            save_tiny_model(folder / "receiver", "llama", byte_level_tokenizer()),
            save_tiny_model(folder / "sharer", "qwen3", metaspace_tokenizer(), seed=1),
        ]
        model = C2CForCausalLM.from_receiver_and_sharers(
            *names, mode=mode, fuser_hidden_size=8, fuser_intermediate_size=8
        )
        self.folder = folder / "fuser"
        randomize_fuser(model, 3).save_pretrained(self.folder)
        processor = C2CProcessor.from_receiver_and_sharers(*names, mode=mode)
        texts = ["The keeper counted ships.", "Hello"]
        self.inputs = processor(texts, sharer_context=["forty-seven ships", "hello"], padding=True)
        self.logits, self.ids = self.answer(model)

    @torch.no_grad()
    def answer(self, model: C2CForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
        return model(**self.inputs).logits[:, -1].float(), model.generate(**self.inputs, **GREEDY)


@pytest.fixture(scope="module", params=MODES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("places", ["auto", "some-layers-on-disk", "disk"])
def test_device_maps(saved: Saved, role: str, places: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": "auto"}
    if places != "auto":
        rest = "disk" if places == "disk" else "cpu"
        device_map = {"model.embed_tokens": rest, "model.norm": rest, "model.rotary_emb": rest, "lm_head": rest}
        device_map |= {f"model.layers.{i}": rest if i == 0 else "disk" for i in range(5 if role == "sharer" else 3)}
        options = {"device_map": device_map, "offload_folder": str(tmp_path)}
    model = C2CForCausalLM.from_pretrained(saved.folder, **{f"{role}_kwargs": options})
    base = model.receiver if role == "receiver" else model.sharers[0]
    offloaded = {parameter.device.type for parameter in base.parameters()} - {"cpu"}
    assert offloaded == (set() if places == "auto" else {"meta"})
    logits, ids = saved.answer(model)
    torch.testing.assert_close(logits, saved.logits, rtol=0, atol=1e-5)
    assert torch.equal(ids, saved.ids)


@pytest.mark.parametrize("role", ROLES)
def test_offloading_with_accelerate(saved: Saved, role: str) -> None:
    model = C2CForCausalLM.from_pretrained(saved.folder)
    base = model.receiver if role == "receiver" else model.sharers[0]
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}
    logits, ids = saved.answer(model)
    torch.testing.assert_close(logits, saved.logits, rtol=0, atol=1e-5)
    assert torch.equal(ids, saved.ids)


@pytest.mark.parametrize("receiver", ["eager", "sdpa"])
@pytest.mark.parametrize("sharer", ["eager", "sdpa"])
def test_attention_implementations(saved: Saved, receiver: str, sharer: str) -> None:
    kwargs = [{"attn_implementation": name} for name in (receiver, sharer)]
    model = C2CForCausalLM.from_pretrained(saved.folder, receiver_kwargs=kwargs[0], sharer_kwargs=kwargs[1])
    logits, ids = saved.answer(model)
    torch.testing.assert_close(logits, saved.logits, rtol=0, atol=1e-4)
    assert torch.equal(ids, saved.ids)


@pytest.mark.parametrize("receiver", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharer", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precisions(saved: Saved, receiver: torch.dtype, sharer: torch.dtype) -> None:
    """The receiver's precision is the answer's."""
    kwargs = [{"dtype": dtype} for dtype in (receiver, sharer)]
    model = C2CForCausalLM.from_pretrained(saved.folder, receiver_kwargs=kwargs[0], sharer_kwargs=kwargs[1])
    with torch.no_grad():
        outputs = model(**saved.inputs, use_cache=True)
    assert outputs.logits.dtype == outputs[CACHE_ARGUMENT].layers[0].keys.dtype == receiver
    logits, _ = saved.answer(model)
    # Tiny models with large weights: 3 % of the largest logit where both are rounded.
    atol = 1e-5 if receiver == sharer == torch.float32 else 0.03 * float(saved.logits.abs().max())
    torch.testing.assert_close(logits, saved.logits, rtol=0, atol=atol)
