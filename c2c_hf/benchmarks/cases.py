"""What is timed: prefill, decoding, a training step, memory slots, each beside the parts of its floor.

The floor of a prefill with fusion is the receiver's prefill (last logits only), the sharers' prefills (no logits) and
the fuser's products as batched matrix products of the same shapes.
"""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .._compat import CACHE_ARGUMENT
from ..fusers.c2c import C2CFuser, FuserPart
from ..fusers.grouped_linear import GroupedLinear
from ..inference.fusion import TokenStates
from ..inference.prefill import LayerStates, cached_states, full_length_cache, position_ids_from_mask, prefill
from ..inference.sharer_cache import SharerCache, prefill_sharer
from ..modeling_c2c import C2CForCausalLM
from ..training.sharer_cache_store import SharerCacheStore
from .timing import Rounds, peak_memory, reset_peak_memory, synchronize, time_in_turn


def open_gates(model: C2CForCausalLM) -> None:
    """Open all gates of an untrained fuser, so that it does as much work as any trained one."""
    with torch.no_grad():
        for name, parameter in model.fuser.named_parameters():
            if "gate_logit" in name:
                parameter.fill_(1.0)


def random_prompt(model: C2CForCausalLM, length: int, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs of random tokens, equally many for the sharer; all positions but the last are fused.

    Returns:
        The inputs of `forward`, `(batch_size, length)` each.
    """
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
    """Return a function that computes a fuser's matrix products only, with random numbers of the same shapes."""
    pairs = []
    for module in model.fuser.modules():
        if isinstance(module, GroupedLinear):
            entries, out_features, in_features = module.weight.shape
            options = {"dtype": model.receiver.dtype, "device": module.weight.device}
            hidden_states = torch.randn(entries, num_tokens, in_features, **options)
            pairs.append((hidden_states, torch.randn(entries, out_features, in_features, **options).transpose(1, 2)))

    def multiply() -> None:
        for hidden_states, weight in pairs:
            torch.bmm(hidden_states, weight)

    return multiply


def _prefill_receiver(model: C2CForCausalLM, inputs: dict[str, torch.Tensor]) -> None:
    """Prefill the receiver with its prompt, with the last logits only."""
    cache = DynamicCache(config=model.receiver.config.get_text_config())
    prefill(model.receiver, cache, inputs["input_ids"], inputs["attention_mask"], logits_to_keep=1)


def _prefill_sharers(model: C2CForCausalLM, inputs: dict[str, torch.Tensor]) -> list[SharerCache]:
    """Prefill every sharer, without logits."""
    return [
        prefill_sharer(sharer, inputs["sharer_input_ids"], inputs["sharer_attention_mask"]) for sharer in model.sharers
    ]


@torch.no_grad()
def benchmark_prefill(model: C2CForCausalLM, length: int, batch_size: int, rounds: int = 5) -> Rounds:
    """Time `fused`, and the parts of its floor: `receiver`, `sharers`, `fuser`."""
    inputs = random_prompt(model, length, batch_size)
    return time_in_turn(
        {
            "fused": lambda: model(**inputs, logits_to_keep=1, use_cache=True),
            "receiver": lambda: _prefill_receiver(model, inputs),
            "sharers": lambda: _prefill_sharers(model, inputs),
            "fuser": fuser_products(model, batch_size * (length - 1)),
        },
        rounds,
    )


def fuser_inputs(
    model: C2CForCausalLM, sharer_cache: SharerCache, states: LayerStates, num_tokens: int
) -> list[tuple[FuserPart, torch.Tensor, torch.Tensor]]:
    """Gather what the first sharer's fuser takes: its parts, each with the sharer's and the receiver's states.

    Args:
        model: The pair.
        sharer_cache: The sharer's cache.
        states: The receiver's states.
        num_tokens: Number of first tokens of every row that are fused, each with the sharer's at the same position.
    """
    fuser, batch_size = cast(C2CFuser, model.fuser[0]), states[0][0].shape[0]
    rows, places = torch.arange(batch_size).repeat_interleave(num_tokens), torch.arange(num_tokens).repeat(batch_size)
    sharer_tokens = TokenStates(sharer_cache.entries(), rows, places)
    receiver_tokens = TokenStates([keys for keys, _ in states] + [values for _, values in states], rows, places)
    return [
        (part, sharer_tokens.gather_joined(part.sources), receiver_tokens.gather(part.entries))
        for part in fuser.parts(len(receiver_tokens), model.receiver.dtype)
    ]


class _TokenClock(StoppingCriteria):
    """Records when each token is generated, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def benchmark_decode(model: C2CForCausalLM, length: int, new_tokens: int = 16, rounds: int = 5) -> Rounds:
    """Time a decoding step after a prompt, from the first token on: `fused`, and `receiver` without fusion.

    A round's number is the mean of `new_tokens` steps.
    """
    inputs = random_prompt(model, length, 1)
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    count = new_tokens + 1
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    both: dict[str, tuple[PreTrainedModel, dict[str, torch.Tensor]]]
    both = {"fused": (model, inputs), "receiver": (model.receiver, plain)}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    # The first round warms up.
    for number in range(1 + rounds):
        for name, (generator, prompt) in both.items():
            clock = _TokenClock()
            generator.generate(**prompt, stopping_criteria=StoppingCriteriaList([clock]), **options)
            if number > 0:
                seconds[name].append((clock.times[-1] - clock.times[0]) / new_tokens)
    return Rounds(seconds)


def benchmark_training_step(
    model: C2CForCausalLM, prompt_length: int, answer_length: int, batch_size: int, rounds: int = 5
) -> Rounds:
    """Time a training `step` without its optimizer, and the parts of its floor.

    `stored` is the step with the sharers' caches from disk (`sharer_cache_dir`). `receiver` and `sharers` prefill the
    prompt without gradient; `fuser` is its forward and backward pass; `answer` is the receiver's forward and backward
    pass over the answer, on a cache that takes gradients.
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
    prompt = (ids[:, :head], mask[:, :head], positions[:, :head])
    dtype = model.receiver.dtype
    autocast = torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()
    cache = full_length_cache()
    prefill(model.receiver, cache, *prompt)
    states = cached_states(cache)
    c2c_fuser = cast(C2CFuser, model.fuser[0])
    parts = fuser_inputs(model, _prefill_sharers(model, inputs)[0], states, head)

    def step(sharer_caches: list[SharerCache] | None = None) -> None:
        with autocast:
            options = {"logits_to_keep": answer_length + 1, "use_cache": False, "sharer_caches": sharer_caches}
            model(**inputs, labels=labels, **options).loss.backward()
        model.fuser.zero_grad()

    def fuser() -> None:
        with autocast:
            changes = [c2c_fuser(*part) for part in parts]
        torch.autograd.backward(changes, [change.detach() for change in changes])
        model.fuser.zero_grad()

    def answer() -> None:
        past = DynamicCache()
        for layer_idx, (keys, values) in enumerate(states):
            past.update(keys.detach().requires_grad_(), values.detach().requires_grad_(), layer_idx)
        with autocast:
            logits = model.receiver(
                input_ids=ids[:, head:],
                attention_mask=mask,
                position_ids=positions[:, head:],
                **{CACHE_ARGUMENT: past},
            ).logits
            model.loss_function(logits=logits, labels=labels[:, head:], vocab_size=logits.shape[-1]).backward()

    with TemporaryDirectory() as folder:
        store = SharerCacheStore(folder, model)
        sharer_texts = ([inputs["sharer_input_ids"]], [inputs["sharer_attention_mask"]])
        functions: dict[str, Callable[[], object]] = {
            "step": step,
            "stored": lambda: step(store.load(*sharer_texts)),
            "receiver": lambda: prefill(model.receiver, full_length_cache(), *prompt),
            "sharers": lambda: _prefill_sharers(model, inputs),
            "fuser": fuser,
            "answer": answer,
        }
        return time_in_turn(functions, rounds)


@torch.no_grad()
def benchmark_memory(
    model: C2CForCausalLM, context_length: int, prompt_length: int = 32, rounds: int = 5
) -> tuple[Rounds, dict[str, int]]:
    """Time the first token after a question about a context: from memory slots, or with the context in the `prompt`.

    The slots are timed `warm`, where the sharer's cache of the context exists already, as for a document that many
    questions are asked about, and `cold`, where the sharer prefills the context first.

    Args:
        model: A pair with `mode="memory"`.
        context_length: Tokens of the context, equally many for the sharer and the receiver.
        prompt_length: Tokens of the question.
        rounds: How often each is timed.

    Returns:
        The times, and the bytes of the sharer's cache as a message: `message`, and rounded to 8 bits `message_int8`.
    """
    ids = random_prompt(model, context_length + prompt_length, 1)["input_ids"]
    alignment = torch.full_like(ids, -1)
    alignment[:, 1 : context_length + 1] = torch.arange(context_length)
    sharer_cache = SharerCache.prefill(model.sharers[0], ids[:, :context_length])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sharer_input_ids": ids[:, :context_length],
        "sharer_alignment": alignment,
    }
    timed = time_in_turn(
        {
            "warm": lambda: model(**inputs, sharer_caches=sharer_cache, logits_to_keep=1, use_cache=True),
            "cold": lambda: model(**inputs, logits_to_keep=1, use_cache=True),
            "prompt": lambda: _prefill_receiver(model, inputs),
        },
        rounds,
    )
    message, message_int8 = (len(sharer_cache.to_safetensors(int8=int8)) for int8 in (False, True))
    return timed, {"message": message, "message_int8": message_int8}


@torch.no_grad()
def prefill_memory(model: C2CForCausalLM, length: int, batch_size: int) -> tuple[int, int] | None:
    """Measure the peak of memory during a prefill with fusion, and its floor: weights, fuser and final cache.

    Returns:
        Both in bytes; `None` where neither CUDA nor Linux reports the peak. On the CPU the peak counts the whole
        process, Python and its libraries included.
    """
    inputs = random_prompt(model, length, batch_size)
    gc.collect()
    if not reset_peak_memory(model.device):
        return None
    cache = model(**inputs, logits_to_keep=1, use_cache=True)[CACHE_ARGUMENT]
    peak = peak_memory(model.device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return peak, weights + sum(states.nbytes for pair in cached_states(cache) for states in pair)
