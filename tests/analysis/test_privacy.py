"""What a linear probe recovers, where the answer is known."""

import pytest
import torch
from evaluation_for_tests import pair
from fitting_for_tests import texts

for extra in ("sklearn", "matplotlib"):
    pytest.importorskip(extra, reason="the analysis needs the extra `[analysis]`")


@pytest.fixture(scope="module", params=["fusion", "memory"])
def recovered(request: pytest.FixtureRequest) -> tuple[str, dict]:
    from c2c_hf.analysis.privacy import probe_privacy

    model, processor = pair(mode=request.param)
    samples = texts(60)
    found = probe_privacy(
        model, processor, samples[:40], samples[40:], num_layers=2, num_test_tokens=150, progress=False
    )
    return request.param, {(own.payload, own.layer): own for own in found}


def test_the_first_layer_reveals_its_tokens(recovered: tuple[str, dict]) -> None:
    """Its values are a linear map of the normalized embedding; with other tokens' states nothing is recovered."""
    mode, found = recovered
    own = found["sharer cache", 0]
    assert own.num_tokens == 150 and own.vocabulary > 500
    assert own.top1 > 0.9
    assert found["sharer cache, int8", 0].top1 == pytest.approx(own.top1, abs=0.05)
    assert found["sharer cache, int4", 0].top1 > 0.5
    assert found["mismatched sharer cache", 0].top1 < 0.3
    assert {payload for payload, _ in found} == {
        *("sharer cache", "sharer cache, int8", "sharer cache, int4", "mismatched sharer cache", "frequency"),
        *(("memory slots", "mismatched memory slots") if mode == "memory" else ()),
        *(("projected states", "mismatched projected states") if mode == "fusion" else ()),
    }
    for entry in found.values():
        assert entry.top1 <= entry.top10
        assert entry.top1_interval[0] <= entry.top1 <= entry.top1_interval[1]
        assert entry.top10_interval[0] <= entry.top10 <= entry.top10_interval[1]


def test_ranks_are_those_of_a_naive_search() -> None:
    from c2c_hf.analysis.privacy import _rank

    generator = torch.Generator().manual_seed(0)
    predicted, directions = torch.randn(100, 5, generator=generator), torch.randn(30, 5, generator=generator)
    ids = torch.randint(30, (100,), generator=generator)
    naive = [
        sorted(range(30), key=lambda token: -float(row @ directions[token])).index(int(right))
        for row, right in zip(predicted, ids, strict=True)
    ]
    assert _rank(predicted, directions, ids).tolist() == naive


def test_intervals_draw_texts_rather_than_tokens() -> None:
    """Texts that are recovered whole or not at all say less than as many independent tokens."""
    from c2c_hf.analysis.privacy import _summarize

    ranks = torch.tensor([0] * 200 + [99] * 200)
    whole, mixed = torch.arange(400) // 40, torch.arange(400) % 10
    wide, narrow = (_summarize("p", 0, ranks, own, 100, 0) for own in (whole, mixed))
    assert wide.top1 == narrow.top1 == 0.5
    assert wide.top1_interval[0] < 0.3 < 0.7 < wide.top1_interval[1]
    assert narrow.top1_interval == (0.5, 0.5), "every text has the same share"


def test_errors() -> None:
    from c2c_hf.analysis.privacy import probe_privacy

    model, processor = pair()
    with pytest.raises(ValueError, match="`test_texts` must be other texts"):
        probe_privacy(model, processor, ["a b", "c d"], ["c d"])
    with pytest.raises(ValueError, match="`payloads` must be one of"):
        probe_privacy(model, processor, ["a b"], ["c d"], payloads=["tokens"])
