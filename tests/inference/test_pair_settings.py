"""What processor and model must agree on is compared where they meet; texts and caches must belong together."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import random_ids, tiny_c2c
from safetensors.torch import load, load_file, save, save_file
from tokenizers_for_tests import byte_level_tokenizer
from training_for_tests import make_model, make_processor

from c2c_hf import C2CCache, C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments, SharerCache
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.configuration_c2c import C2CConfig
from c2c_hf.evaluation.methods.c2c_answerer import C2CAnswerer
from c2c_hf.inference.pair_settings import PairSettings

SETTINGS = PairSettings("memory", "sharer", 2, "span", "0f23456789abcdef", None)


def test_settings_survive_the_batch() -> None:
    decoded = PairSettings.from_tensor(SETTINGS.to_tensor(3))
    assert decoded == PairSettings("memory", "sharer", 2, "span", "0f23456789abcde", None)
    for wrong in (
        torch.zeros(2),
        torch.tensor([[1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        torch.tensor([[9, 0, 0, 0, 0, 0]]),
    ):
        with pytest.raises(ValueError, match="`sharer_settings` must be those of one `C2CProcessor`"):
            PairSettings.from_tensor(wrong)


@pytest.mark.parametrize("num_sharers", [1, 2])
@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_inputs_of_another_processor(mode: str, num_sharers: int, tmp_path: Path) -> None:
    model, own = make_model(num_sharers, mode=mode), make_processor(sharers=num_sharers)
    other_mode = "memory" if mode == "fusion" else "fusion"
    tokenizers = (own.tokenizer, own.sharer_tokenizers)
    right = C2CProcessor(*tokenizers, "span", mode=mode)
    wrong = {"`mode` of the processor is": C2CProcessor(*tokenizers, "span", mode=other_mode)}
    if mode == "memory":
        wrong["`memory_sink_tokens` of the"] = C2CProcessor(*tokenizers, mode=mode, memory_sink_tokens=2)
        wrong["`memory_grid` of the"] = C2CProcessor(*tokenizers, mode=mode, memory_grid="sharer")
    else:
        wrong["`token_alignment` of the"] = C2CProcessor(*tokenizers, "first")
    model.config.receiver_tokenizer_hash = right.settings[0].receiver_hash
    wrong["vocabulary of the receiver"] = C2CProcessor(byte_level_tokenizer(300), tokenizers[1], "span", mode=mode)
    context = {"sharer_context": "The keeper counted ships"}
    inputs = right("Where is Paris?", **context)
    assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=2, eos_token_id=-1).shape[1] == inputs["input_ids"].shape[1] + 2
    arguments = C2CTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for message, processor in wrong.items():
        inputs = processor("Where is Paris?", **({} if "token_alignment" in message else context))
        for call in (
            lambda inputs=inputs: model(**inputs),
            lambda inputs=inputs: model.generate(**inputs, max_new_tokens=2),
            lambda processor=processor: C2CTrainer(model, arguments, processing_class=processor),
            lambda processor=processor: C2CAnswerer(model, processor=processor),
            lambda processor=processor: model.push_to_hub("me/fuser", processor=processor),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    fewer = C2CProcessor(tokenizers[0], tokenizers[1][:1] * (3 - num_sharers), "span", mode=mode)
    with pytest.raises(ValueError, match=f"The processor has {3 - num_sharers} sharers, but the model {num_sharers}"):
        model.generate(**fewer("Where?", **context), max_new_tokens=2)


def test_an_alignment_shorter_than_padded_ids() -> None:
    model, ids = tiny_c2c(), random_ids(1, 8)
    alignment = torch.arange(8).unsqueeze(0).masked_fill(torch.arange(8) == 7, -1)
    inputs = {"input_ids": ids, "sharer_input_ids": ids, "sharer_alignment": alignment}
    for use_cache in (True, False):
        answer = model.generate(**inputs, max_new_tokens=3, use_cache=use_cache, do_sample=False)
        assert answer.shape == (1, 11)
    padded = {**inputs, "input_ids": torch.nn.functional.pad(ids, (3, 0))}
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
        with pytest.raises(ValueError, match="must cover the 11 new tokens, but its length is 8"):
            call(**padded)


def test_a_cache_of_another_text() -> None:
    model, ids = tiny_c2c(), random_ids(2, 8)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    cache = C2CCache()
    first = model.generate(input_ids=ids, **options, **{CACHE_ARGUMENT: cache})
    other = torch.cat([first, random_ids(2, 4, seed=3)], 1)
    for row, column in ((0, 0), (1, 2)):
        other[row, column] += 1 - 2 * (other[row, column] > 50).long()
    with pytest.raises(ValueError, match="holds 10 tokens of a text of 2 rows, but `input_ids`"):
        model.generate(input_ids=other[:1], **options, **{CACHE_ARGUMENT: cache})
    # What is the same at the beginning of all rows stays, and the answer is that of an empty cache.
    for text in (other, torch.cat([first[:, :1], other[:, 1:]], 1)):
        expected = model.generate(input_ids=text, **options)
        kept = C2CCache()
        model.generate(input_ids=ids, **options, **{CACHE_ARGUMENT: kept})
        assert torch.equal(model.generate(input_ids=text, **options, **{CACHE_ARGUMENT: kept}), expected)
    same = torch.cat([first, random_ids(2, 4, seed=3)], 1)
    assert model.generate(input_ids=same, **options, **{CACHE_ARGUMENT: cache}).shape == (2, 18)
    cache.crop(-(cache.get_seq_length() - 2))
    cropped = torch.cat([other[:, :2], random_ids(2, 5, seed=4)], 1)
    assert model.generate(input_ids=cropped, **options, **{CACHE_ARGUMENT: cache}).shape == (2, 10)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_c2c()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name, value in weights.items() if value.dim() > 1)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"The weight {name} in model.safetensors holds numbers that are not finite"):
        C2CForCausalLM.from_pretrained(tmp_path, receiver=model.receiver, sharers=model.sharers[0])
    data = SharerCache.prefill(model.sharers[0], random_ids(1, 5)).to_safetensors()
    metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    for value in (float("nan"), float("inf")):
        tensors = load(data)
        tensors["layers.1.values"][0, 0, 2, 1] = value
        with pytest.raises(ValueError, match="The values of layer 1 of a sharer cache are not finite"):
            SharerCache.from_safetensors(save(tensors, metadata))
    with pytest.raises(ValueError, match="`initial_gate_temperature` must be a number, but got inf"):
        C2CConfig(initial_gate_temperature=float("inf"))
