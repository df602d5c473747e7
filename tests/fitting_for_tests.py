"""Memory pairs and texts for the tests of closed-form fits."""

import torch
from conftest import tiny_model
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor

WORDS = "The keeper counted ships . Paris is short 北京 天空 def return café 🎉 hello user breakfast".split()


def texts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (12,), generator=generator)) for _ in range(count)
    ]
    return [*drawn, *TEXT]


def memory_pair(same: bool, sink: int = 1, **fields) -> tuple[C2CForCausalLM, C2CProcessor]:
    """Receiver and sharer are one model with one tokenizer, or differ in everything."""
    tokenizers = [byte_level_tokenizer(), byte_level_tokenizer() if same else metaspace_tokenizer()]
    names = ("llama", "llama") if same else ("llama", "gemma3")
    models = [tiny_model(name, 0, len(tokenizer)) for name, tokenizer in zip(names, tokenizers, strict=True)]
    fields = {"mode": "memory", "memory_source_layers": 1, "memory_sink_tokens": sink, **fields}
    model = C2CForCausalLM.from_receiver_and_sharers(models[0], models[1], **fields)
    processor = C2CProcessor.from_config(model.config, *tokenizers)
    return model, processor
