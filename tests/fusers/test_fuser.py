"""The fuser: grouped entries equal single ones, closed gates cost nothing, training noise, gradients."""

import math

import pytest
import torch
from conftest import CONFIGS
from naive import naive_change
from torch.profiler import ProfilerActivity, profile

import c2c_hf.fusers.c2c as fuser_module
from c2c_hf import C2CConfig
from c2c_hf.configuration_c2c import SharerConfig
from c2c_hf.fusers.c2c import C2CFuser, Gate
from c2c_hf.fusers.grouped_linear import GroupedLinear

UNEQUAL = [(2, 8, 8), (1, 16, 12), (2, 8, 4)]
EQUAL = [(2, 8, 8)] * 6
SHARER = [(3, 4, 4), (1, 10, 6)]


def build_fuser(receiver, sharer, sizes, **fields) -> C2CFuser:
    return C2CFuser(C2CConfig(receiver_layer_shapes=receiver, **fields), SharerConfig(layer_shapes=sharer, **sizes))


def random_fuser(receiver=UNEQUAL, sharer=SHARER, **fields) -> C2CFuser:
    torch.manual_seed(0)
    sizes = {"fuser_hidden_size": 12, "fuser_intermediate_size": 20, "num_fuser_layers": 4, "fuser_dropout": 0.2}
    sizes = {name: fields.pop(name, value) for name, value in sizes.items()}
    fuser = build_fuser(receiver, sharer, sizes, **fields)
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            parameter.copy_(torch.randn_like(parameter) if "gate_logit" in name else parameter * 3)
    return fuser.eval()


def changes_of(fuser: C2CFuser, shared, own) -> list[torch.Tensor | None]:
    """Run a fuser on the states of some tokens; one change per receiver entry, `None` where the gate is closed."""
    changes: list[torch.Tensor | None] = [None] * len(own)
    for part in fuser.parts(len(own[0]), own[0].dtype):
        sharer, receiver = (
            torch.stack([torch.cat([s[i] for i in joined], -1) for joined in indices])
            for s, indices in ((shared, part.sources), (own, [[entry] for entry in part.entries]))
        )
        for entry, change in zip(part.entries, fuser(part, sharer, receiver), strict=True):
            changes[entry] = change
    return changes


def states(shapes, num_tokens: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    keys = [torch.randn(num_tokens, heads * key_dim, dtype=dtype) for heads, key_dim, _ in shapes]
    return keys + [torch.randn(num_tokens, heads * value_dim, dtype=dtype) for heads, _, value_dim in shapes]


@pytest.mark.parametrize("receiver", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@torch.no_grad()
def test_equals_single_entries(receiver) -> None:
    fuser = random_fuser(receiver)
    own, shared = states(receiver), states(SHARER)
    changes = changes_of(fuser, shared, own)
    assert any(change is None for change in changes)
    assert any(change is not None for change in changes)
    for entry, change in enumerate(changes):
        expected = torch.stack(
            [
                naive_change(fuser, entry, token, mine)
                for token, mine in zip(shared[fuser.sources[entry][0]], own[entry], strict=True)
            ]
        )
        torch.testing.assert_close(
            torch.zeros_like(expected) if change is None else change, expected, atol=1e-4, rtol=1e-4
        )


def run(fuser: C2CFuser, shared, own) -> list[torch.Tensor | None]:
    with torch.no_grad():
        return changes_of(fuser, shared, own)


def same(one, other) -> bool:
    """Whether two lists of changes are equal bit for bit, `None` where nothing changes."""
    pairs = list(zip(one, other, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    return all(a is None or torch.equal(a, b) for a, b in pairs)


def test_no_token_at_all() -> None:
    fuser = random_fuser()
    changes = run(fuser, states(SHARER, 0), states(UNEQUAL, 0))
    assert [change.shape for change in changes if change is not None]
    for change, own in zip(changes, states(UNEQUAL, 0), strict=True):
        assert change is None or change.shape == own.shape


def test_sizes_of_each_sharer() -> None:
    config = C2CConfig(
        receiver_layer_shapes=EQUAL,
        sharers=[SharerConfig(config=CONFIGS[name], layer_shapes=[(3, 4, 4)]) for name in ("llama", "qwen3")],
    )
    config.override({"fuser_hidden_size": [8, 12], "num_fuser_layers": [2, 4], "fuser_dropout": [0.0, 0.3]})
    (first,), (second,) = (C2CFuser(config, sharer).groups for sharer in config.sharers)
    assert [first.projector.in_proj.weight.shape[1], second.projector.in_proj.weight.shape[1]] == [8, 12]
    assert [len(first.projector.feature_ffns), len(second.projector.feature_ffns)] == [0, 2]
    assert [first.projector.shared_ffn.dropout.p, second.projector.shared_ffn.dropout.p] == [0.0, 0.3]


def count_products(fuser: C2CFuser, receiver, sharer) -> tuple[int, int]:
    """Calls of batched products, and matrices multiplied in them."""
    own, shared = states(receiver), states(sharer)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        changes_of(fuser, shared, own)
    calls = [event for event in profiled.events() if event.name in ("aten::bmm", "aten::baddbmm")]
    matrices = [event.input_shapes[0 if event.name == "aten::bmm" else 1][0] for event in calls]
    waits = [e for e in profiled.events() if e.name in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")]
    assert not waits, "the forward pass waits for the device"
    return len(calls), sum(matrices)


def test_products_do_not_grow_with_layers_and_closed_gates_cost_nothing() -> None:
    sharer = [(3, 4, 4)] * 2
    counts = []
    for layers in (2, 12):
        receiver = [(2, 8, 8)] * layers
        fuser = random_fuser(receiver, sharer)
        with torch.no_grad():
            (group,) = fuser.groups
            group.gate.gate_logit.fill_(1.0)
        changes_of(fuser, states(sharer), states(receiver))
        calls, matrices = count_products(fuser, receiver, sharer)
        counts.append(calls)
        with torch.no_grad():
            group.gate.gate_logit[::2] = 0.0
        changes = changes_of(fuser, states(sharer), states(receiver))
        assert [change is None for change in changes] == [True, False] * layers
        assert count_products(fuser, receiver, sharer) == (calls, matrices // 2)
        with torch.no_grad():
            group.gate.gate_logit.fill_(-1.0)
        assert not fuser.parts(5, torch.float32)
        assert count_products(fuser, receiver, sharer) == (0, 0)
    assert counts[0] == counts[1]


def _step(fuser: C2CFuser, optimizer: type[torch.optim.Optimizer], **kwargs) -> None:
    for parameter in fuser.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(fuser.parameters(), lr=0.05, **kwargs).step()


def _train_fused(fuser: C2CFuser) -> None:
    fuser.train()
    _step(fuser, torch.optim.AdamW, fused=True)
    fuser.eval()


def _load(fuser: C2CFuser) -> None:
    fuser.load_state_dict({name: -value for name, value in fuser.state_dict().items()})


def _write_past_autograd(fuser: C2CFuser) -> None:
    for parameter in fuser.parameters():
        parameter.data.neg_()
    # Nothing tells of such a write; setting the mode, as every evaluation does, makes the fuser look again.
    fuser.eval()


WEIGHT_CHANGES = {
    "optimizer": lambda fuser: _step(fuser, torch.optim.SGD),
    "fused optimizer": _train_fused,
    "load_state_dict": _load,
    "dtype": lambda fuser: fuser.to(torch.bfloat16),
    "dtype and back": lambda fuser: fuser.to(torch.bfloat16).to(torch.float32),
    # As DeepSpeed, averaging callbacks and many scripts write.
    "data in place": _write_past_autograd,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("open_share", [1.0, 0.5])
def test_entries_in_parts(grad: bool, open_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few entries at a time give what all at once give."""
    fuser = build_fuser(EQUAL, EQUAL, {"fuser_hidden_size": 8, "fuser_intermediate_size": 12}).eval()
    with torch.no_grad():
        for group in fuser.groups:
            group.gate.gate_logit.fill_(1.0)[int(open_share * len(group.entries)) :] = -1.0
    entries = [torch.randn(7, 16) for _ in range(2 * len(EQUAL))]
    (group,) = fuser.groups
    count = len(group.active_entries())
    with torch.set_grad_enabled(grad):
        whole = changes_of(fuser, entries, entries)
        for size in (1, 2):
            monkeypatch.setattr(fuser_module, "PART_BYTES", 7 * 8 * 4 * size)
            parts = group.parts(7, torch.float32)
            assert [part.stop - part.start for part in parts] == [size] * (count // size) + [count % size][
                : count % size
            ]
            for change, expected in zip(changes_of(fuser, entries, entries), whole, strict=True):
                assert (change is None) == (expected is None)
                if change is not None:
                    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    assert fuser.train().groups[0].parts(7, torch.float32) == [slice(0, len(group.entries))]


@pytest.mark.parametrize("name", WEIGHT_CHANGES)
def test_weights_are_prepared_anew_when_they_change(name: str) -> None:
    """A fuser that has run computes what one computes that never ran with the weights of before."""
    sharer = [(3, 4, 4)]
    fuser = random_fuser(EQUAL, sharer)
    own, shared = states(EQUAL), states(sharer)
    before = run(fuser, shared, own)
    assert 0 < sum(change is None for change in before) < 12, "a part of a stack is what is prepared"
    WEIGHT_CHANGES[name](fuser)
    after = run(fuser, shared, own)
    fresh = random_fuser(EQUAL, sharer).to(next(fuser.parameters()).dtype)
    fresh.load_state_dict(fuser.state_dict())
    assert same(after, run(fresh, shared, own))
    assert not same(after, before), "the weights did not change, so nothing was compared"


def test_made_and_used_in_inference_mode() -> None:
    own, shared = states(UNEQUAL), states(SHARER)
    expected = run(random_fuser(), shared, own)
    with torch.inference_mode():
        assert same(changes_of(random_fuser(), shared, own), expected)


def test_bfloat16_states_and_float32_parameters() -> None:
    fuser = random_fuser()
    own, shared = states(UNEQUAL), states(SHARER)
    with torch.no_grad():
        expected = changes_of(fuser, shared, own)
        changes = changes_of(fuser, [s.bfloat16() for s in shared], [s.bfloat16() for s in own])
    assert all(parameter.dtype == torch.float32 for parameter in fuser.parameters())
    for change, reference in zip(changes, expected, strict=True):
        assert (change is None) == (reference is None)
        if change is not None:
            assert change.dtype == torch.bfloat16
            assert (change.float() - reference).abs().max() < 0.1 * reference.abs().max()
    # One copy of the weights in place of two makes no difference.
    with torch.no_grad():
        assert same(
            changes_of(fuser.to(torch.bfloat16), [s.bfloat16() for s in shared], [s.bfloat16() for s in own]), changes
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_parameter(autocast: bool) -> None:
    fuser = random_fuser().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        changes = changes_of(fuser, states(SHARER), states(UNEQUAL))
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
    assert gate.open_entries() == [1]
    # Nearly all gates are open or closed at the end of training, and none at its beginning.
    undecided = ((soft > 0.01) & (soft < 0.99)).float().mean()
    assert undecided < 0.01
    early = gate.soft(4000, 2, torch.tensor(1.0))[0]
    assert ((early > 0.01) & (early < 0.99)).float().mean() > 0.95


def test_gates_follow_logit_noise_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(2)
    with torch.no_grad():
        gate.gate_logit.copy_(torch.tensor([0.5, -1.0]))
    noise = torch.randn(2, 3, 4)
    monkeypatch.setattr(gate, "sample_noise", lambda shape: noise.reshape(shape))
    expected = torch.sigmoid((torch.tensor([0.5, -1.0]).view(2, 1, 1) + noise) / 0.25)
    torch.testing.assert_close(gate.soft(3, 4, torch.tensor(0.25)), expected)


def test_noise_is_finite_at_the_ends_of_its_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(1)
    for uniform in (0.0, 1.0 - 2.0**-24):
        monkeypatch.setattr(
            torch, "rand", lambda shape, device=None, dtype=None, u=uniform: torch.full(shape, u, dtype=dtype)
        )
        soft = gate.soft(2, 2, torch.tensor(0.001))
        assert torch.isfinite(gate.sample_noise((1, 2, 2))).all()
        assert torch.isfinite(soft).all()
        soft.sum().backward()
        assert torch.isfinite(gate.gate_logit.grad).all()


def test_dropout_is_for_training() -> None:
    fuser = random_fuser()
    own, shared = states(UNEQUAL), states(SHARER)
    with torch.no_grad():
        first, second = changes_of(fuser, shared, own), changes_of(fuser, shared, own)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for probability, expected in ((0.2, False), (0.0, True)):
        training = random_fuser(fuser_dropout=probability).train()
        for group in training.groups:
            # The gates' noise is not what is looked at.
            group.gate.sample_noise = torch.zeros
        assert same(changes_of(training, shared, own), changes_of(training, shared, own)) is expected


def test_autocast_at_inference() -> None:
    fuser = random_fuser()
    own, shared = states(UNEQUAL), states(SHARER)
    expected = run(fuser, shared, own)
    with torch.autocast("cpu", torch.bfloat16):
        changes = run(fuser, shared, own)
    for change, reference in zip(changes, expected, strict=True):
        assert (change is None) == (reference is None)
        if change is not None:
            assert change.dtype == torch.float32
            assert (change - reference).abs().max() < 0.1 * reference.abs().max()


def test_a_new_fuser_is_closed() -> None:
    fuser = build_fuser(UNEQUAL, SHARER, {"fuser_hidden_size": 8, "fuser_intermediate_size": 8}).eval()
    assert not fuser.parts(5, torch.float32)
    assert changes_of(fuser, states(SHARER), states(UNEQUAL)) == [None] * 6


def test_initialization_is_that_of_linear_layers() -> None:
    torch.manual_seed(0)
    grouped = GroupedLinear(4, 50, 60)
    for parameter in grouped.parameters():
        assert parameter.abs().max() <= 50**-0.5
        assert parameter.detach().std() == pytest.approx(50**-0.5 / 3**0.5, rel=0.1)
    x = torch.randn(4, 7, 50)
    for entry in range(4):
        expected = torch.nn.functional.linear(x[entry], grouped.weight[entry], grouped.bias[entry])
        torch.testing.assert_close(grouped(x)[entry], expected)


def test_a_new_fuser_starts_as_linear_layers_do() -> None:
    fuser = build_fuser(UNEQUAL, SHARER, {"fuser_hidden_size": 32, "fuser_intermediate_size": 48})
    layers = [module for module in fuser.modules() if isinstance(module, GroupedLinear)]
    assert len(layers) == 9 * len(fuser.groups)
    for grouped in layers:
        bound = grouped.weight.shape[-1] ** -0.5
        assert 0.9 * bound < grouped.weight.abs().max() <= bound
        assert grouped.bias is None or 0 < grouped.bias.abs().max() <= bound
    norms = [parameter for name, parameter in fuser.named_parameters() if "norm" in name]
    assert norms
    assert all((norm == 1).all() for norm in norms)


def test_unknown_entry() -> None:
    with pytest.raises(IndexError, match="`entry` must be below 6, but got 6"):
        random_fuser().locate(6)
