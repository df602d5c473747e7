"""A prefill that stops: same states as a whole one, nothing behind them computed, and whole where somebody watches."""

import pytest
import torch
from conftest import CONFIGS, random_ids, tiny_c2c, tiny_model
from transformers import PreTrainedModel

from c2c_hf.inference.passing_caches import is_untouched
from c2c_hf.inference.prefill import cached_states, full_length_cache, prefill

COMPILES = {"compile": lambda m: m.compile(), "compiled forward": lambda m: setattr(m, "forward", m.forward)}


def last_leaf_calls(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each call of the norm behind the last layer, without hooking it."""
    names = [name for name, _ in model.base_model.named_children()]
    norm = model.base_model.get_submodule(next(name for name in names if name in ("norm", "ln_f")))
    calls: list[int] = []

    class Watched(type(norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            calls.append(hidden_states.shape[1])
            return super().forward(hidden_states)

    monkeypatch.setattr(norm, "__class__", Watched)
    return calls


def states_of(model: PreTrainedModel, **kwargs) -> list[torch.Tensor]:
    """Read twelve tokens in two goes, as a continued cache does."""
    ids, cache = random_ids(2, 12), full_length_cache()
    mask, positions = torch.ones_like(ids), torch.arange(12).expand(2, -1)
    prefill(model, cache, ids[:, :7], mask[:, :7], positions[:, :7], **kwargs)
    prefill(model, cache, ids[:, 7:], mask, positions[:, 7:], **kwargs)
    return [states for pair in cached_states(cache) for states in pair]


@pytest.mark.parametrize("name", CONFIGS)
def test_stops_with_the_same_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    calls = last_leaf_calls(model, monkeypatch)
    whole = states_of(model)
    assert calls == [7, 5]
    stopped = states_of(model, num_layers=len(whole) // 2)
    assert calls == [7, 5], "the pass went on behind the last layer's states"
    for one, other in zip(whole, stopped, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_goes_on_where_more_is_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    layers = len(states_of(model)) // 2
    calls = last_leaf_calls(model, monkeypatch)
    logits = prefill(model, full_length_cache(), random_ids(1, 4), logits_to_keep=2, num_layers=layers)
    assert logits.shape[:2] == (1, 2)
    prefill(model, full_length_cache(), random_ids(1, 4), with_gradient=True, num_layers=layers)
    assert calls == [4, 4]


def test_goes_on_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    calls = last_leaf_calls(model, monkeypatch)
    mlp = model.base_model.layers[-1].mlp
    for register in (mlp.register_forward_hook, mlp.register_forward_pre_hook):
        hook = register(lambda *_: None)
        states_of(model, num_layers=3)
        hook.remove()
    assert calls == [7, 5] * 2
    states_of(model, num_layers=3)
    assert calls == [7, 5] * 2


@pytest.mark.parametrize("kind", COMPILES)
def test_goes_on_where_it_is_compiled(kind: str) -> None:
    model = tiny_model("llama")
    assert is_untouched(model)
    COMPILES[kind](model.base_model)
    assert not is_untouched(model)


def test_the_pair_reads_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_c2c()
    ids = random_ids(1, 9)
    expected = model(input_ids=ids).logits
    receiver, sharer = (last_leaf_calls(m, monkeypatch) for m in (model.receiver, model.sharers[0]))
    last = model(input_ids=ids, logits_to_keep=1).logits
    # The sharer's end is never needed, the receiver's for the last token.
    assert (receiver, sharer) == ([1], [])
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-5, atol=1e-5)
