"""Tiny pairs with their processors for the tests of the analysis, and why some of these tests may not run."""

import pytest
from conftest import randomize_fuser, tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor

NEEDS = "the analysis needs scikit-learn and matplotlib (extra `[analysis]`)"


def need_the_extra() -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module, reason=NEEDS)


def pair(
    receiver: str = "llama", sharers: tuple[str, ...] = ("gemma3",), **fields: object
) -> tuple[C2CForCausalLM, C2CProcessor]:
    """A pair whose fuser changes the receiver's states strongly."""
    tokenizers = [byte_level_tokenizer(), *(metaspace_tokenizer() for _ in sharers)]
    models = [
        tiny_model(name, seed, len(tokenizer))
        for seed, (name, tokenizer) in enumerate(zip((receiver, *sharers), tokenizers, strict=True))
    ]
    model = C2CForCausalLM.from_receiver_and_sharers(
        models[0], models[1:], fuser_hidden_size=16, fuser_intermediate_size=16, token_alignment="span", **fields
    )
    if model.config.mode == "fusion":
        randomize_fuser(model, seed=1)
    return model.eval(), C2CProcessor.from_config(model.config, tokenizers[0], tokenizers[1:])
