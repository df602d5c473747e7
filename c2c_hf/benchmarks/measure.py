"""What C2C costs against its floor on this machine: both prefills and the fuser's own multiplications.

The floor of a prefill with fusion = the receiver's prefill (last logits only) + the sharers' prefills (no logits) +
the fuser's products as batched matrix products of the same shapes. All are timed in turn, round after round, so that a
noisy machine slows all of them alike; a ratio is the median of the rounds' ratios.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from .._compat import CACHE_ARGUMENT
from ..fusers.grouped_linear import StackedLinear
from ..inference.output_head import contiguous_head
from ..inference.prefill import (
    SharerCache,
    cached_states,
    full_length_cache,
    position_ids_from_mask,
    prefill,
    read_text,
)
from ..inference.token_states import TokenStates
from ..modeling_c2c import C2CForCausalLM
from ..training.sharer_cache_store import SharerCacheStore


@dataclass
class Rounds:
    """Seconds of several things, timed in turn.

    Attributes:
        seconds: Per name one number a round.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """Return the fastest and the slowest round."""
        return min(self.seconds[name]), max(self.seconds[name])

    def ratio(self, name: str, *others: str) -> float:
        """Return the median over the rounds of one thing's time over the sum of others'."""
        sums = [sum(parts) for parts in zip(*(self.seconds[other] for other in others), strict=True)]
        return statistics.median(mine / whole for mine, whole in zip(self.seconds[name], sums, strict=True))


def time_in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> Rounds:
    """Time functions in turn, after some rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return Rounds(seconds)


def open_gates(model: C2CForCausalLM) -> None:
    """Open all gates of an untrained fuser, so that it does all the work that a trained one may do."""
    with torch.no_grad():
        for name, parameter in model.fuser.named_parameters():
            if "gate_logit" in name:
                parameter.fill_(1.0)


def random_prompt(model: C2CForCausalLM, length: int, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs of random tokens, as long for the sharer, of which all but the last position fuse."""
    generator = torch.Generator().manual_seed(seed)
    vocab_sizes = [base.config.get_text_config().vocab_size for base in (model.receiver, *model.sharers)]
    ids = torch.randint(10, min(vocab_sizes), (batch_size, length), generator=generator)
    columns = torch.arange(length)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sharer_input_ids": ids,
        "sharer_attention_mask": torch.ones_like(ids),
        "sharer_alignment": columns.masked_fill(columns == length - 1, -1).expand(batch_size, -1),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def fuser_products(model: C2CForCausalLM, num_tokens: int) -> Callable[[], None]:
    """Return a function that does a fuser's matrix products alone, with random numbers of the same shapes."""
    pairs = []
    for module in model.fuser.modules():
        if isinstance(module, StackedLinear):
            entries, out_features, in_features = module.weight.shape
            kwargs: dict[str, Any] = {"dtype": model.receiver.dtype, "device": module.weight.device}
            hidden_states = torch.randn(entries, num_tokens, in_features, **kwargs)
            pairs.append((hidden_states, torch.randn(entries, out_features, in_features, **kwargs).transpose(1, 2)))

    def multiply() -> None:
        for hidden_states, weight in pairs:
            torch.bmm(hidden_states, weight)

    return multiply


def _read_alone(model: C2CForCausalLM, inputs: dict[str, torch.Tensor]) -> None:
    """Let the receiver read its prompt, with the last logits alone."""
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with contiguous_head(model.receiver):
        model.receiver(**plain, logits_to_keep=1, use_cache=True)


def _read_sharers(model: C2CForCausalLM, inputs: dict[str, torch.Tensor]) -> list[SharerCache]:
    """Let every sharer read its text, without logits."""
    text = (inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
    return [read_text(sharer, *text) for sharer in model.sharers]


@torch.no_grad()
def benchmark_prefill(model: C2CForCausalLM, length: int, batch_size: int, rounds: int = 5) -> Rounds:
    """Time `fused`, and the parts of its floor: `receiver`, `sharers`, `fuser`."""
    inputs = random_prompt(model, length, batch_size)
    return time_in_turn(
        {
            "fused": lambda: model(**inputs, logits_to_keep=1, use_cache=True),
            "receiver": lambda: _read_alone(model, inputs),
            "sharers": lambda: _read_sharers(model, inputs),
            "fuser": fuser_products(model, batch_size * (length - 1)),
        },
        rounds,
    )


class _TokenClock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        _synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def benchmark_decode(model: C2CForCausalLM, length: int, new_tokens: int = 16, rounds: int = 5) -> Rounds:
    """Time a decoding step behind a prompt, `fused` and by the `receiver` itself, from the first token on.

    A round's number is the mean of `new_tokens` steps.
    """
    inputs = random_prompt(model, length, 1)
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    count = new_tokens + 1
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    both: tuple[tuple[str, Any, dict[str, torch.Tensor]], ...]
    both = (("fused", model, inputs), ("receiver", model.receiver, plain))
    seconds: dict[str, list[float]] = {"fused": [], "receiver": []}
    # The first round warms up.
    for number in range(1 + rounds):
        for name, generating, prompt in both:
            clock = _TokenClock()
            generating.generate(**prompt, stopping_criteria=StoppingCriteriaList([clock]), **options)
            if number > 0:
                seconds[name].append((clock.times[-1] - clock.times[0]) / new_tokens)
    return Rounds(seconds)


def benchmark_training_step(
    model: C2CForCausalLM, prompt_length: int, answer_length: int, batch_size: int, rounds: int = 5
) -> Rounds:
    """Time a training `step` without its optimizer, and the parts of its floor.

    `stored` is the step with the sharers' states from a disk (`sharer_cache_dir`). `receiver` and `sharers` read the
    prompt without gradient; `fuser` runs forward and backward on it; `answer` is the receiver's forward and backward
    over the answer, behind a cache that takes gradients.
    """
    inputs = random_prompt(model, prompt_length + answer_length, batch_size)
    columns = torch.arange(prompt_length + answer_length, device=model.device)
    inputs["sharer_alignment"] = columns.masked_fill(columns >= prompt_length - 1, -1).expand(batch_size, -1)
    for name in ("sharer_input_ids", "sharer_attention_mask"):
        inputs[name] = inputs[name][:, :prompt_length]
    labels = inputs["input_ids"].masked_fill(columns < prompt_length, -100)
    head = prompt_length - 1
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = position_ids_from_mask(mask)
    read: dict[str, Any] = {"attention_mask": mask[:, :head], "position_ids": positions[:, :head]}
    device_type, dtype = model.device.type, model.receiver.dtype
    autocast = torch.autocast(device_type, dtype) if dtype != torch.float32 else nullcontext()
    cache = full_length_cache()
    prefill(model.receiver, cache, ids[:, :head], **read)
    states = cached_states(cache)
    rows, places = (index.flatten() for index in torch.meshgrid(*map(torch.arange, (batch_size, head)), indexing="ij"))
    sharer_tokens = list(TokenStates(_read_sharers(model, inputs)[0].entries(), rows, places))
    receiver_tokens = list(TokenStates([keys for keys, _ in states] + [values for _, values in states], rows, places))

    def step(**given: Any) -> None:
        with autocast:
            kwargs: dict[str, Any] = {"logits_to_keep": answer_length + 1, "use_cache": False, **given}
            model(**inputs, labels=labels, **kwargs).loss.backward()
        model.fuser.zero_grad()

    def fuser() -> None:
        with autocast:
            changes = model.fuser[0](sharer_tokens, receiver_tokens)
        torch.autograd.backward([c for c in changes if c is not None], [c.detach() for c in changes if c is not None])
        model.fuser.zero_grad()

    def answer() -> None:
        past = DynamicCache()
        for layer_idx, pair in enumerate(states):
            past.update(*(state.detach().requires_grad_() for state in pair), layer_idx)
        with autocast, contiguous_head(model.receiver):
            logits = model.receiver(
                input_ids=ids[:, head:],
                attention_mask=mask,
                position_ids=positions[:, head:],
                **{CACHE_ARGUMENT: past},
            ).logits
            model.loss_function(logits=logits, labels=labels[:, head:], vocab_size=logits.shape[-1]).backward()

    with TemporaryDirectory() as folder:
        store = SharerCacheStore(folder, model)
        functions: dict[str, Callable[[], Any]] = {
            "step": step,
            "stored": lambda: step(
                sharer_caches=store.load([inputs["sharer_input_ids"]], [inputs["sharer_attention_mask"]])
            ),
            "receiver": lambda: prefill(model.receiver, full_length_cache(), ids[:, :head], **read),
            "sharers": lambda: _read_sharers(model, inputs),
            "fuser": fuser,
            "answer": answer,
        }
        return time_in_turn(functions, rounds)


@torch.no_grad()
def benchmark_memory(
    model: C2CForCausalLM, context_length: int, prompt_length: int = 32, rounds: int = 5
) -> tuple[Rounds, dict[str, int]]:
    """Time the first token about a context that a sharer has read: `remembering` it, and the receiver `reading` it.

    Args:
        model: A pair with `mode="memory"`.
        context_length: Tokens of the context, as many for the sharer as for the receiver.
        prompt_length: Tokens of the question.
        rounds: How often each is timed.

    Returns:
        The times, and the bytes of the sharer's states as a message: `states`, and rounded to 8 bits `states_int8`.
    """
    ids = random_prompt(model, context_length + prompt_length, 1)["input_ids"]
    alignment = torch.full_like(ids, -1)
    alignment[:, 1 : context_length + 1] = torch.arange(context_length)
    state = SharerCache.prefill(model.sharers[0], ids[:, :context_length])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sharer_input_ids": ids[:, :context_length],
        "sharer_alignment": alignment,
    }

    timed = time_in_turn(
        {
            "remembering": lambda: model(**inputs, sharer_caches=state, logits_to_keep=1, use_cache=True),
            "reading": lambda: _read_alone(model, inputs),
        },
        rounds,
    )
    return timed, {"states": len(state.to_safetensors()), "states_int8": len(state.to_safetensors(int8=True))}


@torch.no_grad()
def peak_memory(model: C2CForCausalLM, length: int, batch_size: int) -> tuple[float, float] | None:
    """Return the most memory that a prefill with fusion needs, and that of weights, fuser and final cache, in bytes.

    `None` where neither CUDA nor Linux tells. On a processor the first counts what the process holds besides, Python
    and its libraries, from after they were loaded.
    """
    inputs = random_prompt(model, length, batch_size)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif not _reset_resident_peak():
        return None
    cache: Any = model(**inputs, logits_to_keep=1, use_cache=True)[CACHE_ARGUMENT]
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else _resident("VmHWM")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = sum(state.nbytes for pair in cached_states(cache) for state in pair)
    return float(peak), float(weights + states)


def _reset_resident_peak() -> bool:
    # What was freed but not given back would count.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
