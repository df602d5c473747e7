"""Sharers whose input is more than tokens: a vision-language model, and embeddings in place of ids."""

import pytest
import torch
from conftest import enlarge_weights, random_ids, tiny_c2c, tiny_model
from naive import read, turned
from transformers import CLIPVisionConfig, DynamicCache, LlavaConfig, LlavaForConditionalGeneration

from c2c_hf import C2CForCausalLM, SharerCache
from c2c_hf._compat import CACHE_ARGUMENT

IMAGE, PATCHES = 5, 4
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def llava() -> LlavaForConditionalGeneration:
    """An image of 8 x 8 pixels is four tokens of a small Llama."""
    torch.manual_seed(4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tiny_model("llama").config
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    return enlarge_weights(model.eval())


def memory_model(vision: LlavaForConditionalGeneration, others: int = 0) -> C2CForCausalLM:
    fields = {"mode": "memory", "memory_grid": "sharer", "memory_source_layers": 2}
    others = [tiny_model("llama", 7) for _ in range(others)]
    model = C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama", 1), [vision, *others], **fields)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


SHARER_IDS = torch.tensor([[1, 7, *[IMAGE] * PATCHES, 9, 11]])
#: The prompt's first token, a slot for each position of the image, and the question.
INPUT_IDS = torch.tensor([[1, *[0] * PATCHES, 20, 30, 40]])
ALIGNMENT = torch.tensor([[-1, 2, 3, 4, 5, -1, -1, -1]])


def inputs_of(pixel_values: torch.Tensor) -> dict:
    rows = len(pixel_values)
    return {
        "input_ids": INPUT_IDS.repeat(rows, 1),
        "sharer_input_ids": SHARER_IDS.repeat(rows, 1),
        "sharer_alignment": ALIGNMENT.repeat(rows, 1),
        "sharer_model_inputs": {"pixel_values": pixel_values},
    }


@torch.no_grad()
def naive_logits(model: C2CForCausalLM, pixel_values: torch.Tensor) -> torch.Tensor:
    """Slot by slot: the sharer runs as transformers runs it, and the receiver over a cache that is put together."""
    states = DynamicCache()
    (sharer,) = model.sharers
    sharer(input_ids=SHARER_IDS, pixel_values=pixel_values, use_cache=True, **{CACHE_ARGUMENT: states})
    positions = range(2, 2 + PATCHES)
    text_model = sharer.model.language_model
    keys = [
        torch.stack([turned(text_model, layer.keys[0, :, i], -i).flatten() for i in positions])
        for layer in states.layers
    ]
    values = [torch.stack([layer.values[0, :, i].flatten() for i in positions]) for layer in states.layers]
    cache = DynamicCache()
    read(model.receiver, INPUT_IDS[0, :1], cache)
    for layer, (slot_keys, slot_values) in enumerate(model.fuser[0](keys + values)):
        placed = [turned(model.receiver, slot_keys[i], 1 + i) for i in range(PATCHES)]
        cache.update(torch.stack(placed, 1)[None], slot_values.transpose(0, 1)[None], layer)
    return read(model.receiver, INPUT_IDS[0, 1 + PATCHES :], cache)


@torch.no_grad()
def test_an_image_fills_memory_slots() -> None:
    model = memory_model(llava())
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = model(**inputs_of(images), logits_to_keep=3).logits
    for image, row in zip(images, logits, strict=True):
        torch.testing.assert_close(row, naive_logits(model, image[None]), atol=1e-4, rtol=0)
    assert (logits[0] - logits[1]).abs().max() > 0.1, "the image makes no difference"
    # A cache prefilled elsewhere, and every mode of `generate`.
    cache = SharerCache.prefill(model.sharers[0], SHARER_IDS, model_inputs={"pixel_values": images[:1]})
    given = inputs_of(images[:1])
    given.pop("sharer_model_inputs")
    torch.testing.assert_close(model(**given, sharer_caches=cache, logits_to_keep=3).logits[0], logits[0])
    expected = model.generate(**given, sharer_caches=cache, **GREEDY)
    assert torch.equal(model.generate(**inputs_of(images[:1]), **GREEDY), expected)
    both = model.generate(**inputs_of(images), **GREEDY)
    assert torch.equal(both[:1], expected)
    assert model.generate(**inputs_of(images), num_beams=2, **GREEDY).shape == both.shape
    with model.disable_fusion():
        alone = model.generate(**inputs_of(images[:1]), **GREEDY)[:, INPUT_IDS.shape[1] :]
        plain = model.receiver.generate(torch.cat([INPUT_IDS[:, :1], INPUT_IDS[:, 1 + PATCHES :]], 1), **GREEDY)
        assert torch.equal(alone, plain[:, -5:])


@torch.no_grad()
def test_embeddings_in_place_of_ids() -> None:
    """Of one of two sharers, in fusion mode; in memory mode with the image's features among them."""
    model = tiny_c2c("llama", ["qwen3", "llama"], token_alignment="span")
    ids, own = random_ids(1, 9), [random_ids(1, 7, seed=1), random_ids(1, 5, seed=2)]
    alignments = [torch.tensor([[0, 2, 3, -1, 4, 5, 6, 6, -1]]), torch.tensor([[0, 0, 1, 1, 2, 3, -1, 4, -1]])]
    shared = {"input_ids": ids, "sharer_alignment": alignments}
    expected = model(**shared, sharer_input_ids=own).logits
    embeds = [None, model.sharers[1].get_input_embeddings()(own[1])]
    found = model(**shared, sharer_input_ids=[own[0], None], sharer_inputs_embeds=embeds).logits
    torch.testing.assert_close(found, expected)
    answer = model.generate(**shared, sharer_input_ids=[own[0], None], sharer_inputs_embeds=embeds, **GREEDY)
    assert torch.equal(answer, model.generate(**shared, sharer_input_ids=own, **GREEDY))

    model, image = memory_model(llava()), torch.randn(1, 3, 8, 8)
    sharer, inputs = model.sharers[0], inputs_of(image)
    embeds = sharer.get_input_embeddings()(SHARER_IDS).clone()
    features = sharer.model.get_image_features(pixel_values=image, return_dict=True).pooler_output
    embeds[0, 2 : 2 + PATCHES] = torch.cat(list(features)).view(PATCHES, -1)
    expected = model(**inputs).logits[:, -1]
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "sharer_alignment")}
    torch.testing.assert_close(model(**inputs, sharer_inputs_embeds=embeds).logits[:, -1], expected)


@torch.no_grad()
def test_a_text_sharer_beside_it() -> None:
    model = memory_model(llava(), others=1)
    image, context = torch.randn(1, 3, 8, 8), random_ids(1, 3)
    alignments = [
        torch.tensor([[-1, 2, 3, 4, 5, -1, -1, -1, -1, -1]]),
        torch.tensor([[-1, -1, -1, -1, -1, 1, 2, -1, -1, -1]]),
    ]
    inputs = {
        "input_ids": torch.tensor([[1, 0, 0, 0, 0, 0, 0, 20, 30, 40]]),
        "sharer_input_ids": [SHARER_IDS, context],
        "sharer_alignment": alignments,
    }
    logits = model(**inputs, sharer_model_inputs=[{"pixel_values": image}, None]).logits[:, -1]
    assert not torch.allclose(logits, model(**inputs, sharer_model_inputs=[None, {}]).logits[:, -1], atol=1e-3)


def test_invalid_inputs_are_rejected() -> None:
    model = memory_model(llava())
    inputs = inputs_of(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`sharer_model_inputs` must hold one entry per sharer \(1\), but got 2"):
        model(**{**inputs, "sharer_model_inputs": [None, None]})
    with pytest.raises(ValueError, match="`sharer_input_ids` must be given beside `sharer_model_inputs`"):
        model(**{**inputs, "sharer_input_ids": None})
    cache = SharerCache.prefill(model.sharers[0], SHARER_IDS)
    with pytest.raises(ValueError, match="`sharer_caches` must be None for sharer 0, whose inputs are given"):
        model(**inputs, sharer_caches=cache)
