"""A decoding step compiles as one graph, once for all steps and prompts, and gives what it gives without."""

import pytest
import torch
from conftest import tiny_c2c
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from c2c_hf._compat import CACHE_ARGUMENT


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_decoding_with_a_static_cache(name: str) -> None:
    model = tiny_c2c(name).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    # A graph break would be an error.
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    for prompt in range(2):
        input_ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(prompt))
        config = model.receiver.config.get_text_config()
        plain, compiled = (StaticCache(config=config, max_cache_len=32) for _ in range(2))
        for cache in (plain, compiled):
            model(input_ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        for index in range(3):
            token = {"input_ids": torch.full((2, 1), 5 + index), "position_ids": torch.full((2, 1), 9 + index)}
            expected = model(**token, **{CACHE_ARGUMENT: plain}).logits
            found = step(**token, **{CACHE_ARGUMENT: compiled}).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
