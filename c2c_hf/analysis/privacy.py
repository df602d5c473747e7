"""What a transmitted cache reveals: how many of a text's tokens a linear probe recovers from key/value states.

The probe is a ridge regression from the states of a token to its input embedding. It ranks the whole vocabulary by
cosine similarity with what it predicts, so that it also finds tokens that it was never fitted on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..configuration_c2c import check_choice
from ..inference.sharer_cache import prefill_sharer, round_states
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .states import FuserStates, collect_states

try:
    from scipy.stats import bootstrap
    from sklearn.linear_model import Ridge
except ImportError as error:
    raise ImportError('the analysis needs scikit-learn: run `pip install "c2c_hf[analysis]"`.') from error

#: Of standardized states, for each of `num_tokens` tokens.
_ALPHA = 1e-3
#: What is probed: the sharer's cache, and the projected states or memory slots.
PAYLOADS = ("cache", "fuser")
#: Tokens that are ranked at once.
_CHUNK = 64


@dataclass(frozen=True)
class Recovery:
    """How many tokens of held-out texts a probe recovers from one kind of states.

    Attributes:
        payload: `"sharer cache"`, the same in 8 or 4 bits, `"projected states"`, `"memory slots"`, or a control:
            `"mismatched states"`, those of other tokens, and `"frequency"`, the most frequent tokens of the texts that
            the probe was fitted on.
        layer: Whose keys and values are probed; `None` for `"frequency"`.
        top1: Share of the tokens that the probe ranks first, 0..1.
        top1_interval: 95 %, of a bootstrap over texts.
        top10: Share of the tokens among the probe's first ten.
        top10_interval: Likewise.
        num_tokens: Number of held-out tokens.
        vocabulary: Number of tokens that are ranked.
    """

    payload: str
    layer: int | None
    top1: float
    top1_interval: tuple[float, float]
    top10: float
    top10_interval: tuple[float, float]
    num_tokens: int
    vocabulary: int


@dataclass
class _Tokens:
    """Tokens of texts, with the states of each payload: by `(payload, layer)`, `(num_tokens, width)`."""

    ids: torch.Tensor
    texts: torch.Tensor
    states: dict[tuple[str, int], torch.Tensor]

    def pick(self, chosen: torch.Tensor) -> "_Tokens":
        return _Tokens(self.ids[chosen], self.texts[chosen], {key: own[chosen] for key, own in self.states.items()})


@torch.no_grad()
def probe_privacy(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    train_texts: Sequence[str],
    test_texts: Sequence[str],
    num_layers: int = 6,
    max_length: int = 256,
    num_test_tokens: int = 600,
    seed: int = 0,
    payloads: Sequence[str] = PAYLOADS,
    progress: bool = True,
) -> list[Recovery]:
    """Measure how many tokens of a text a linear probe recovers from what leaves the sharer's machine.

    Args:
        model: The pair; of several sharers the first.
        processor: Its processor.
        train_texts: The probe is fitted on these; whoever has the base models can make such pairs from any text.
        test_texts: The probe is tested on these.
        num_layers: Number of layers that are probed, evenly spaced from the first to the last.
        max_length: Tokens after which a text is cut.
        num_test_tokens: Number of tokens, drawn at random, of `test_texts`.
        seed: Of the draw and of the bootstrap.
        payloads: Of `PAYLOADS`: what the sharer sends, and what the fuser makes of it.
        progress: Show progress bars.

    Returns:
        One for each payload and layer, the controls last: the sharer's cache as it is and rounded to 8 and 4 bits,
        against the sharer's tokens; the fuser's projections, in memory mode the slots, against the receiver's tokens.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: A text stands among both.
    """
    if set(train_texts) & set(test_texts):
        raise ValueError("`test_texts` must be other texts than `train_texts`, but they share some.")
    for payload in payloads:
        check_choice("payloads", payload, PAYLOADS)
    recoveries: list[Recovery] = []
    for kind, embeddings, collect in (
        ("cache", model.sharers[0].get_input_embeddings(), _sharer_tokens),
        ("fuser", model.get_input_embeddings(), _projected_tokens),
    ):
        if kind not in payloads:
            continue
        train, test = (
            collect(model, processor, texts, num_layers, max_length, progress) for texts in (train_texts, test_texts)
        )
        drawn = torch.randperm(len(test.ids), generator=torch.Generator().manual_seed(seed))[:num_test_tokens]
        test = test.pick(drawn)
        directions = _directions(embeddings)
        shuffled = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed + 1))
        ranks = {}
        for payload, layer in tqdm(train.states, desc="Probing", unit="probe", disable=not progress):
            key = (payload, layer)
            predicted = _fit_and_predict(train.states[key], directions[train.ids], test.states[key])
            ranks[key] = _rank(predicted, directions, test.ids)
            if key == next(iter(train.states)):
                mismatched = {(f"mismatched {payload}", layer): _rank(predicted[shuffled], directions, test.ids)}
        counts = torch.bincount(train.ids, minlength=len(directions))
        # Tokens of equal frequency count as ranked before.
        frequency = (counts[None] >= counts[test.ids][:, None]).sum(1) - 1
        for (payload, layer), own in {**ranks, **mismatched, ("frequency", None): frequency}.items():
            recoveries.append(_summarize(payload, layer, own, test.texts, len(directions), seed))
    return recoveries


def _layers(total: int, count: int) -> list[int]:
    """Choose layers evenly from the first to the last."""
    return sorted({round(index) for index in np.linspace(0, total - 1, min(count, total))})


def _sharer_tokens(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    texts: Sequence[str],
    num_layers: int,
    max_length: int,
    progress: bool,
) -> _Tokens:
    """Prefill the first sharer with texts, in its own tokens, and return its cache as it would be sent."""
    tokenizer, sharer = processor.sharer_tokenizers[0], model.sharers[0]
    special = torch.tensor(tokenizer.all_special_ids)
    parts: list[_Tokens] = []
    for index, text in enumerate(tqdm(texts, desc="Prefilling the sharer", unit="text", disable=not progress)):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        entries = prefill_sharer(sharer, inputs["input_ids"], inputs["attention_mask"]).entries()
        ids = inputs["input_ids"][0]
        kept = ~torch.isin(ids, special)
        total = len(entries) // 2
        states = {}
        for payload, bits in (("sharer cache", None), ("sharer cache, int8", 8), ("sharer cache, int4", 4)):
            for layer in _layers(total, num_layers):
                pair = [entries[layer], entries[total + layer]]
                pair = pair if bits is None else [round_states(own, bits) for own in pair]
                wide = torch.cat([own[0].transpose(0, 1).flatten(1) for own in pair], dim=-1)
                states[payload, layer] = wide.float().cpu()[kept]
        parts.append(_Tokens(ids[kept], torch.full((int(kept.sum()),), index), states))
    return _join(parts)


def _projected_tokens(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    texts: Sequence[str],
    num_layers: int,
    max_length: int,
    progress: bool,
) -> _Tokens:
    """Return what the first sharer's fuser makes of texts, at the receiver's tokens."""
    payload = "memory slots" if model.config.mode == "memory" else "projected states"
    parts = []
    for index, text in enumerate(tqdm(texts, desc="Running the fuser", unit="text", disable=not progress)):
        collected: FuserStates = collect_states(model, processor, [text], max_length)[0]
        total, states = collected.num_layers, {}
        open_layers = [layer for layer in range(total) if None not in _projections(collected, layer)]
        for place in _layers(len(open_layers), num_layers):
            layer = open_layers[place]
            states[payload, layer] = torch.cat(_projections(collected, layer), dim=-1)
        parts.append(_Tokens(collected.token_ids, torch.full_like(collected.token_ids, index), states))
    return _join(parts)


def _projections(states: FuserStates, layer: int) -> list[torch.Tensor]:
    return [states.projected[layer], states.projected[states.num_layers + layer]]  # type: ignore[list-item]


def _join(parts: Sequence[_Tokens]) -> _Tokens:
    return _Tokens(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.texts for part in parts]),
        {key: torch.cat([part.states[key] for part in parts]) for key in parts[0].states},
    )


def _directions(embeddings: nn.Module) -> torch.Tensor:
    """Return the embeddings of a vocabulary, centred and of norm 1, `(vocab_size, hidden_size)` in float32."""
    weight = embeddings.weight.float().cpu()  # type: ignore[operator, union-attr]
    return nn.functional.normalize(weight - weight.mean(0), dim=-1)


def _fit_and_predict(states: torch.Tensor, targets: torch.Tensor, test_states: torch.Tensor) -> torch.Tensor:
    """Regress targets on standardized states and predict those of other states."""
    mean, scale = states.mean(0), states.std(0).clamp_min(1e-6)
    probe = Ridge(alpha=_ALPHA * len(states), solver="cholesky")
    probe.fit(((states - mean) / scale).numpy(), targets.numpy())
    return torch.from_numpy(probe.predict(((test_states - mean) / scale).numpy())).float()


def _rank(predicted: torch.Tensor, directions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return how many tokens are more similar to each prediction than the right one, `(num_tokens,)`."""
    ranks = []
    for own, right in zip(predicted.split(_CHUNK), ids.split(_CHUNK), strict=True):
        scores = own @ directions.T
        ranks.append((scores > scores.gather(1, right[:, None])).sum(1))
    return torch.cat(ranks)


def _summarize(
    payload: str, layer: int | None, ranks: torch.Tensor, texts: torch.Tensor, vocabulary: int, seed: int
) -> Recovery:
    shares, intervals = [], []
    for count in (1, 10):
        found = (ranks < count).double()
        # Tokens of one text are not independent: texts are drawn, not tokens.
        hits, totals = (
            torch.zeros(int(texts.max()) + 1).double().index_add_(0, texts, own).numpy()
            for own in (found, torch.ones_like(found))
        )
        kept = totals > 0
        shares.append(float(found.mean()))
        intervals.append(_interval(hits[kept], totals[kept], seed))
    return Recovery(payload, layer, shares[0], intervals[0], shares[1], intervals[1], len(ranks), vocabulary)


def _interval(hits: np.ndarray, totals: np.ndarray, seed: int) -> tuple[float, float]:
    share: Callable[..., np.ndarray] = lambda own, count, axis: own.sum(axis) / count.sum(axis)  # noqa: E731
    if len(hits) < 2 or np.ptp(hits / totals) == 0:
        return float(hits.sum() / totals.sum()), float(hits.sum() / totals.sum())
    rng = np.random.default_rng(seed)
    result = bootstrap((hits, totals), share, paired=True, n_resamples=2000, method="percentile", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def recovery_table(recoveries: Sequence[Recovery]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row for each payload and layer, in %."""
    yield "| what is sent | layer | top-1, % | top-10, % | tokens | vocabulary |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for own in recoveries:
        cells = [own.payload, "" if own.layer is None else str(own.layer)]
        for share, (low, high) in ((own.top1, own.top1_interval), (own.top10, own.top10_interval)):
            cells.append(f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        cells += [f"{own.num_tokens:,}", f"{own.vocabulary:,}"]
        yield f"| {' | '.join(cells)} |"
