"""Every public feature in every mode, with one and several sharers, an adapter, and sharers that run elsewhere."""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig
from training_for_tests import make_model, make_processor
from transformers import DynamicCache

from c2c_hf import C2CCache, C2CForCausalLM, C2CProcessor, SharerCache
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.checkpoints.base_models import AbsentSharer
from c2c_hf.checkpoints.receiver_adapter import add_adapter

#: The modes, and the fields that make a cell's fuser.
FUSERS: dict[str, dict[str, Any]] = {
    "fusion": {},
    "memory": {"mode": "memory"},
    "shared": {
        "fuser_type": "c2c_shared",
        "shared_hidden_size": 12,
        "shared_num_layers": 2,
        "layer_alignment": "depth_normalized",
        "unrotate_keys": True,
    },
    "complex": {
        "fuser_type": "c2c_complex",
        "layer_alignment": "learned",
        "fusion_source_layers": 2,
        "joint_keys_values": True,
        "unrotate_keys": True,
    },
}
CELLS = list(itertools.product(FUSERS, (1, 2), ("plain", "adapter"), ("present", "absent")))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
TEXTS = ["Where is Paris?", "Who counted the ships before breakfast?"]
CONTEXTS = ["The keeper counted ships", "Paris is the capital of France."]


class Cell:
    """A model with an open fuser, its processor, and the inputs of both texts."""

    def __init__(self, fuser: str, num_sharers: int, adapter: str, sharers: str) -> None:
        torch.manual_seed(3)
        model = make_model(num_sharers, **FUSERS[fuser], fuser_dropout=0.0)
        if adapter == "adapter":
            add_adapter(model.receiver, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate_logit" in name:
                    parameter.fill_(1.0)
                elif name.startswith("fuser.") and parameter.dim() > 1 or ".lora_B." in name:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        own = make_processor(sharers=num_sharers)
        self.processor = C2CProcessor(own.tokenizer, own.sharer_tokenizers, "span", mode=model.config.mode)
        self.whole, self.model = model.eval(), model
        if sharers == "absent":
            model.rotations() if model.config.needs_rotations else None
            absent = [AbsentSharer(sharer.config) for sharer in model.sharers]
            self.model = C2CForCausalLM(model.config, model.receiver, absent).eval()
            self.model.load_state_dict(model.fuser.state_dict(prefix="fuser."), strict=False)
            self.model._rotations = model._rotations

    def with_caches(self, inputs: Any) -> dict[str, Any]:
        """Complete processor outputs by the sharers' caches where the sharers are absent."""
        inputs = dict(inputs)
        if self.model is self.whole:
            return inputs
        ids, masks = (inputs[name] for name in ("sharer_input_ids", "sharer_attention_mask"))
        ids, masks = (value if isinstance(value, list) else [value] for value in (ids, masks))
        sharers = zip(self.whole.sharers, ids, masks, strict=True)
        return {**inputs, "sharer_caches": [SharerCache.prefill(*each) for each in sharers]}

    def inputs(self, texts: Any = TEXTS[0], contexts: Any = CONTEXTS[0]) -> dict[str, Any]:
        return self.with_caches(self.processor(texts, sharer_context=contexts))


@cache
def cell_of(*names: Any) -> Cell:
    return Cell(*names)


@pytest.fixture(params=CELLS, ids=lambda cell: "-".join(map(str, cell)))
def cell(request: pytest.FixtureRequest) -> Cell:
    return cell_of(*request.param)


def answer(cell: Cell, **options: Any) -> list[int]:
    return cell.model.generate(**cell.inputs(), **GREEDY, **options)[0, -4:].tolist()


def test_fusion_changes_the_answer(cell: Cell) -> None:
    """Else nothing below would be tested; with it on, absent sharers answer as present ones."""
    inputs = cell.inputs()
    logits = cell.model(**inputs).logits[:, -1]
    with cell.model.disable_fusion():
        assert not torch.allclose(logits, cell.model(**inputs).logits[:, -1], atol=1e-3)
    present = {name: value for name, value in inputs.items() if name != "sharer_caches"}
    torch.testing.assert_close(logits, cell.whole(**present).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["beams", "static", "no-cache"],
)
def test_generation_modes(cell: Cell, options: dict[str, Any]) -> None:
    found = answer(cell, **options)
    if "num_beams" in options:
        assert len(found) == 4
    else:
        assert found == answer(cell)


def test_a_batch_equals_its_rows(cell: Cell) -> None:
    """Also with a prompt of one token, and a row without context."""
    texts, contexts = [*TEXTS, "x"], [*CONTEXTS, ""]
    batch = cell.model.generate(**cell.inputs(texts, contexts), **GREEDY)[:, -4:].tolist()
    for row, text, context in zip(batch, texts, contexts, strict=True):
        assert row == cell.model.generate(**cell.inputs(text, context), **GREEDY)[0, -4:].tolist()


def test_one_token_prompt_with_context(cell: Cell) -> None:
    inputs = cell.inputs("x")
    assert cell.model(**inputs).logits.isfinite().all()
    assert cell.model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4


def test_embeddings_in_place_of_ids(cell: Cell) -> None:
    expected, inputs = answer(cell), cell.inputs()
    embeds = cell.model.get_input_embeddings()(inputs.pop("input_ids"))
    assert cell.model.generate(inputs_embeds=embeds, **inputs, **GREEDY).tolist() == [expected]


@pytest.mark.parametrize("enabled", [True, False], ids=["fusion-on", "fusion-off"])
@torch.no_grad()
def test_decoding_by_hand(cell: Cell, enabled: bool) -> None:
    """Sharer inputs go into the prefill only, and the mask of later steps has ones."""
    inputs = cell.inputs()
    plain = cell.processor.tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    expected = answer(cell) if enabled else cell.model.receiver.generate(**plain, **GREEDY)[0, -4:].tolist()
    for cache_class in (None, C2CCache):
        mask, found = inputs["attention_mask"], []
        step = {**inputs, CACHE_ARGUMENT: None if cache_class is None else cache_class()}
        for _ in range(4):
            if enabled:
                outputs = cell.model(**{**step, "attention_mask": mask})
            else:
                with cell.model.disable_fusion():
                    outputs = cell.model(**{**step, "attention_mask": mask})
            token = outputs.logits[:, -1:].argmax(-1)
            found.append(int(token))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": token, CACHE_ARGUMENT: outputs[CACHE_ARGUMENT]}
        assert found == expected


@torch.no_grad()
def test_plain_caches_behind_slots_are_refused_while_fusion_is_off(cell: Cell) -> None:
    inputs = {**cell.inputs(), CACHE_ARGUMENT: DynamicCache()}
    with cell.model.disable_fusion():
        if cell.model.config.mode == "fusion":
            assert cell.model(**inputs).logits.isfinite().all()
        else:
            with pytest.raises(ValueError, match="must be a `C2CCache`, which keeps slots masked for later tokens"):
                cell.model(**inputs)


def test_generation_without_fusion_is_the_receivers(cell: Cell) -> None:
    inputs, cached = cell.inputs(), C2CCache()
    plain = cell.processor.tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    expected = cell.model.receiver.generate(**plain, **GREEDY)[0, -4:].tolist()
    with cell.model.disable_fusion():
        for options in ({}, {CACHE_ARGUMENT: cached}, {"num_beams": 1, "use_cache": False}):
            assert cell.model.generate(**inputs, **GREEDY, **options)[0, -4:].tolist() == expected


def test_a_later_turn_on_a_kept_cache(cell: Cell) -> None:
    inputs, cached = cell.inputs(), C2CCache()
    first = cell.model.generate(**inputs, **GREEDY, **{CACHE_ARGUMENT: cached})
    more = torch.cat([first, cell.processor.tokenizer(" ships?", return_tensors="pt")["input_ids"]], 1)
    found = cell.model.generate(
        more, sharer_input_ids=inputs["sharer_input_ids"], **_later(inputs, more), **GREEDY, **{CACHE_ARGUMENT: cached}
    )
    assert found.shape == (1, more.shape[1] + 4)


def _later(inputs: dict[str, Any], text: torch.Tensor) -> dict[str, Any]:
    """The sharer inputs of a longer text whose new tokens have no counterpart."""
    alignments, masks = inputs["sharer_alignment"], inputs["sharer_attention_mask"]
    several = isinstance(alignments, list)
    alignments = [
        torch.nn.functional.pad(alignment, (0, text.shape[1] - alignment.shape[1]), value=-1)
        for alignment in (alignments if several else [alignments])
    ]
    return {
        "sharer_attention_mask": masks,
        "sharer_alignment": alignments,
        **({"sharer_caches": inputs["sharer_caches"]} if "sharer_caches" in inputs else {}),
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "receiver-checkpointing"])
def test_gradients(cell: Cell, checkpointing: bool) -> None:
    inputs, answer_ids = cell.inputs(), torch.tensor([[20, 30]])
    ids = torch.cat([inputs["input_ids"], answer_ids], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer_ids], 1)
    inputs = {**inputs, **_later(inputs, ids), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = cell.model.train()
    try:
        if checkpointing:
            # As `gradient_checkpointing_enable()` does, under whichever name the release has it.
            model.receiver.model.gradient_checkpointing = True
            model.receiver.train()
            with pytest.raises(
                ValueError, match="`receiver`: gradient checkpointing of a base model in training mode"
            ):
                model(**inputs, labels=labels, logits_to_keep=3)
            return
        model.zero_grad()
        model(**inputs, labels=labels, logits_to_keep=3).loss.backward()
        assert all(
            any(p.grad is not None and p.grad.abs().max() > 0 for p in fuser.parameters()) for fuser in model.fuser
        )
    finally:
        model.receiver.model.gradient_checkpointing = False
        model.zero_grad()
        model.eval()
