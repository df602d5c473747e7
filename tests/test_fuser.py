"""The fuser: stacked entries equal single ones, shut gates cost nothing, training noise, gradients."""

import math

import pytest
import torch
from naive import naive_change
from torch.profiler import ProfilerActivity, profile

from c2c_hf import C2CConfig
from c2c_hf.fuser import Fuser, Gate, StackedLinear

UNEQUAL = [(2, 8, 8), (1, 16, 12), (2, 8, 4)]
EQUAL = [(2, 8, 8)] * 6
SHARER = [(3, 4, 4), (1, 10, 6)]


def random_fuser(receiver=UNEQUAL, sharer=SHARER, **fields) -> Fuser:
    torch.manual_seed(0)
    sizes = {"fuser_hidden_size": 12, "fuser_intermediate_size": 20, "num_fuser_layers": 4, "fuser_dropout": 0.2}
    fuser = Fuser(receiver, sharer, C2CConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            parameter.copy_(torch.randn_like(parameter) if "gate_logit" in name else parameter * 3)
    return fuser.eval()


def states(shapes, num_tokens: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    keys = [torch.randn(num_tokens, heads * key_dim, dtype=dtype) for heads, key_dim, _ in shapes]
    return keys + [torch.randn(num_tokens, heads * value_dim, dtype=dtype) for heads, _, value_dim in shapes]


@pytest.mark.parametrize("receiver", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@torch.no_grad()
def test_equals_single_entries(receiver) -> None:
    fuser = random_fuser(receiver)
    own, shared = states(receiver), states(SHARER)
    changes = fuser(shared, own)
    assert any(change is None for change in changes)
    assert any(change is not None for change in changes)
    for entry, change in enumerate(changes):
        expected = torch.stack(
            [
                naive_change(fuser, entry, token, mine)
                for token, mine in zip(shared[fuser.sources[entry]], own[entry], strict=True)
            ]
        )
        torch.testing.assert_close(
            torch.zeros_like(expected) if change is None else change, expected, atol=1e-4, rtol=1e-4
        )


def count_products(fuser: Fuser, receiver, sharer) -> tuple[int, int]:
    """Calls of batched products, and matrices multiplied in them."""
    own, shared = states(receiver), states(sharer)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        fuser(shared, own)
    calls = [event for event in profiled.events() if event.name in ("aten::bmm", "aten::baddbmm")]
    matrices = [event.input_shapes[0 if event.name == "aten::bmm" else 1][0] for event in calls]
    waits = [e for e in profiled.events() if e.name in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")]
    assert not waits, "the forward pass waits for the device"
    return len(calls), sum(matrices)


def test_products_do_not_grow_with_layers_and_shut_gates_cost_nothing() -> None:
    sharer = [(3, 4, 4)] * 2
    counts = []
    for layers in (2, 12):
        receiver = [(2, 8, 8)] * layers
        fuser = random_fuser(receiver, sharer)
        with torch.no_grad():
            (group,) = fuser.groups
            group.gate.gate_logit.fill_(1.0)
        fuser(states(sharer), states(receiver))
        calls, matrices = count_products(fuser, receiver, sharer)
        counts.append(calls)
        with torch.no_grad():
            group.gate.gate_logit[::2] = 0.0
        changes = fuser(states(sharer), states(receiver))
        assert [change is None for change in changes] == [True, False] * layers
        assert count_products(fuser, receiver, sharer) == (calls, matrices // 2)
        with torch.no_grad():
            group.gate.gate_logit.fill_(-1.0)
        assert not fuser.is_open()
        assert count_products(fuser, receiver, sharer) == (0, 0)
    assert counts[0] == counts[1]


def test_weights_are_prepared_anew_when_they_change() -> None:
    fuser = random_fuser()
    own, shared = states(UNEQUAL), states(SHARER)

    def run(fuser: Fuser) -> list[torch.Tensor]:
        with torch.no_grad():
            return [change for change in fuser(shared, own) if change is not None]

    before = run(fuser)
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(0.05)
    after = run(fuser)
    assert len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fresh = random_fuser()
    fresh.load_state_dict(fuser.state_dict())
    for change, expected in zip(run(fresh), after, strict=True):
        assert torch.equal(change, expected)


def test_bfloat16_states_and_float32_parameters() -> None:
    fuser = random_fuser()
    own, shared = states(UNEQUAL), states(SHARER)
    with torch.no_grad():
        expected = fuser(shared, own)
        changes = fuser([s.bfloat16() for s in shared], [s.bfloat16() for s in own])
    assert all(parameter.dtype == torch.float32 for parameter in fuser.parameters())
    for change, reference in zip(changes, expected, strict=True):
        assert (change is None) == (reference is None)
        if change is not None:
            assert change.dtype == torch.bfloat16
            assert (change.float() - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_parameter(autocast: bool) -> None:
    fuser = random_fuser().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        changes = fuser(states(SHARER), states(UNEQUAL))
    sum(change.float().square().sum() for change in changes).backward()
    for name, parameter in fuser.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_gates() -> None:
    """At logit 0 the single Gumbel draw is positive with probability 1 - exp(-1) (reference semantics)."""
    torch.manual_seed(0)
    gate = Gate(3)
    with torch.no_grad():
        gate.gate_logit.copy_(torch.tensor([0.0, 8.0, -8.0]))
    soft = gate.soft(4000, 2, torch.tensor(0.001))
    assert soft.shape == (3, 4000, 2)
    assert torch.isfinite(soft).all()
    opened = (soft > 0.5).float().mean((1, 2))
    assert abs(opened[0].item() - (1 - math.exp(-1))) < 0.02
    assert opened[1] == 1.0
    assert opened[2] < 0.01
    assert torch.isfinite(gate.sample_noise((100_000,))).all()
    assert gate.open_entries() == [1]


def test_dropout_is_for_training() -> None:
    fuser = random_fuser()
    own, shared = states(UNEQUAL), states(SHARER)
    with torch.no_grad():
        first, second = fuser(shared, own), fuser(shared, own)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    fuser.train()
    noisy = [fuser(shared, own)[0] for _ in range(2)]
    assert not torch.equal(*noisy)


def test_a_new_fuser_is_shut() -> None:
    fuser = Fuser(UNEQUAL, SHARER, C2CConfig(fuser_hidden_size=8, fuser_intermediate_size=8)).eval()
    assert not fuser.is_open()
    assert fuser(states(SHARER), states(UNEQUAL)) == [None] * 6


def test_initialisation_is_that_of_linear_layers() -> None:
    torch.manual_seed(0)
    stacked = StackedLinear(4, 50, 60)
    for parameter in stacked.parameters():
        assert parameter.abs().max() <= 50**-0.5
        assert parameter.detach().std() == pytest.approx(50**-0.5 / 3**0.5, rel=0.1)
    x = torch.randn(4, 7, 50)
    for entry in range(4):
        expected = torch.nn.functional.linear(x[entry], stacked.weight[entry], stacked.bias[entry])
        torch.testing.assert_close(stacked(x)[entry], expected)


def test_unknown_entry() -> None:
    with pytest.raises(IndexError, match="`entry` must be below 6, but got 6"):
        random_fuser().locate(6)
