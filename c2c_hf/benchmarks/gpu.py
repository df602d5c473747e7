"""The table of one GPU: prefills, fusion, decoding, slots and training of pairs with the shapes of Qwen models."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..inference.prefill import cached_states, full_length_cache, prefill
from ..inference.sharer_cache import prefill_sharer
from ..modeling_c2c import C2CForCausalLM
from .cases import (
    benchmark_decode,
    benchmark_memory,
    benchmark_prefill,
    benchmark_training_step,
    fuser_inputs,
    open_gates,
    prefill_memory,
    random_prompt,
)
from .suite import SHAPES, Result
from .timing import Rounds, synchronize, time_in_turn

#: Receiver and sharer.
PAIRS = [("Qwen3-0.6B", "Qwen2.5-0.5B"), ("Qwen3-4B", "Qwen3-0.6B"), ("Qwen3-8B", "Qwen3-0.6B")]
TINY_PAIRS = [("tiny-a", "tiny-b")]
LENGTHS, TINY_LENGTHS = (170, 1024, 8192), (24, 48)
BATCH_SIZES, TINY_BATCH_SIZES = (1, 8), (1, 2)
#: Prompt and answer of a training step.
TRAINING = (192, 64)


def build_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Build a base model with random weights where it is to run."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)


def run_gpu_benchmark(
    pairs: Sequence[tuple[str, str]] = PAIRS,
    lengths: Sequence[int] = LENGTHS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    hidden_size: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    rounds: int = 5,
    seconds: float = 400.0,
    compile_fuser: bool = True,
) -> Iterator[Result]:
    """Time one setting after the other, the shortest first.

    Args:
        pairs: Receiver and sharer, names in `SHAPES`.
        lengths: Tokens of the prompt, or in memory mode of the context.
        batch_sizes: Numbers of prompts.
        hidden_size: Of the fuser; all gates are open.
        dtype: Of all models.
        device: Of all models.
        rounds: How often each is timed, after one that does not count.
        seconds: When they are over, the rest is left out.
        compile_fuser: Whether the fuser is compiled as well, in the first setting of each pair.

    Yields:
        `receiver`, `sharer`, `batch_size`, `length` and the figures; or `missing`, which says why there are none.
    """
    end = time.perf_counter() + seconds
    for receiver_name, sharer_name in pairs:
        receiver, sharer = (build_model(name, dtype, device) for name in (receiver_name, sharer_name))
        fusion = C2CForCausalLM.from_receiver_and_sharers(
            receiver,
            sharer,
            token_alignment="span",
            fuser_hidden_size=hidden_size,
            fuser_intermediate_size=hidden_size,
        )
        open_gates(fusion)
        fusion.fuser.to(dtype)
        memory = C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, mode="memory", memory_hidden_size=64)
        memory.fuser.to(dtype)
        for length in lengths:
            for batch_size in batch_sizes:
                setting: Result = {"receiver": receiver_name, "sharer": sharer_name}
                setting |= {"batch_size": batch_size, "length": length}
                if time.perf_counter() > end:
                    yield {**setting, "missing": "out of time"}
                    continue
                # A compilation takes as long as all the rest of a setting.
                compiled = compile_fuser and (length, batch_size) == (lengths[0], batch_sizes[0])
                try:
                    yield {**setting, **_measure(fusion, memory, length, batch_size, rounds, compiled)}
                except torch.OutOfMemoryError:
                    yield {**setting, "missing": "out of memory"}
        del receiver, sharer, fusion, memory
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _measure(
    fusion: C2CForCausalLM, memory: C2CForCausalLM, length: int, batch_size: int, rounds: int, compiled: bool
) -> Result:
    timed = benchmark_prefill(fusion, length, batch_size, rounds)
    found: Result = {
        "receiver_seconds": timed.median("receiver"),
        "sharer_seconds": timed.median("sharers"),
        "first_token_seconds": timed.median("fused"),
        "over_longer_prefill": timed.median("fused") / max(timed.median("receiver"), timed.median("sharers")),
    }
    fused, failures = benchmark_fusion(fusion, length, batch_size, rounds, compiled)
    found |= {f"fusion_{name}_seconds": fused.median(name) for name in fused.seconds}
    found |= {f"fusion_{name}_failure": failure for name, failure in failures.items()}
    found["synchronizations"] = count_synchronizations(fusion, length, batch_size)
    peak = prefill_memory(fusion, length, batch_size)
    if peak is not None:
        found["peak_bytes"], found["weights_and_cache_bytes"] = peak
    if batch_size == 1:
        decoded = benchmark_decode(fusion, length, new_tokens=8, rounds=min(rounds, 3))
        found["decode_seconds"], found["receiver_decode_seconds"] = decoded.median("fused"), decoded.median("receiver")
        slots, _ = benchmark_memory(memory, length, rounds=rounds)
        found |= {f"memory_{name}_seconds": slots.median(name) for name in slots.seconds}
    if length <= 1024:
        prompt, answer = (min(part, length) for part in TRAINING)
        dtype = next(fusion.fuser.parameters()).dtype
        fusion.train().fuser.float()
        step = benchmark_training_step(fusion, prompt, answer, batch_size, min(rounds, 3)).median("step")
        fusion.eval().fuser.to(dtype)
        found["training_tokens_per_second"] = batch_size * (prompt + answer) / step
    return found


@torch.no_grad()
def benchmark_fusion(
    model: C2CForCausalLM, length: int, batch_size: int, rounds: int = 5, compile_fuser: bool = True
) -> tuple[Rounds, dict[str, str]]:
    """Time the fuser alone on gathered states: `eager`, `compiled` where asked for, and as a CUDA `graph`.

    Returns:
        The times, and why `compiled` or `graph` is missing.
    """
    inputs = random_prompt(model, length, batch_size)
    head = length - 1
    cache = full_length_cache()
    prefill(model.receiver, cache, inputs["input_ids"][:, :head], inputs["attention_mask"][:, :head])
    states = cached_states(cache)
    sharer_cache = prefill_sharer(model.sharers[0], inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
    fuser: Any = model.fuser[0]
    parts = fuser_inputs(model, sharer_cache, states, head)

    def run(forward: Callable[..., torch.Tensor]) -> None:
        for part in parts:
            forward(*part)

    functions: dict[str, Callable[[], object]] = {"eager": lambda: run(fuser)}
    failures = {}
    if compile_fuser:
        try:
            compiled = torch.compile(fuser)
            run(compiled)
            functions["compiled"] = lambda: run(compiled)
        except Exception as error:  # What a compiler of this machine may raise is not known.
            failures["compiled"] = f"{type(error).__name__}: {str(error)[:120]}"
    if model.device.type == "cuda":
        run(fuser)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run(fuser)
            functions["graph"] = graph.replay
        except RuntimeError as error:
            failures["graph"] = str(error).splitlines()[0][:120]
    else:
        failures["graph"] = "no CUDA device"
    return time_in_turn(functions, rounds), failures


@torch.no_grad()
def count_synchronizations(model: C2CForCausalLM, length: int, batch_size: int) -> int | None:
    """Count where a prefill with fusion waits for the device; `None` without CUDA.

    One is needed, that of the alignment.
    """
    if model.device.type != "cuda":
        return None
    inputs = random_prompt(model, length, batch_size)
    model(**inputs, logits_to_keep=1)
    synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


#: Heading, key, factor and digits of the columns of the table.
_COLUMNS = (
    ("receiver's prefill, ms", "receiver_seconds", 1e3, 1),
    ("sharer's, ms", "sharer_seconds", 1e3, 1),
    ("fusion, ms", "fusion_eager_seconds", 1e3, 2),
    ("compiled", "fusion_compiled_seconds", 1e3, 2),
    ("CUDA graph", "fusion_graph_seconds", 1e3, 2),
    ("first token, ms", "first_token_seconds", 1e3, 1),
    ("over the longer prefill", "over_longer_prefill", 1, 2),
    ("decoding, ms a token", "decode_seconds", 1e3, 1),
    ("receiver's", "receiver_decode_seconds", 1e3, 1),
    ("memory warm, ms", "memory_warm_seconds", 1e3, 1),
    ("cold", "memory_cold_seconds", 1e3, 1),
    ("in the prompt", "memory_prompt_seconds", 1e3, 1),
    ("training, tokens/s", "training_tokens_per_second", 1, 0),
    ("peak, GiB", "peak_bytes", 2**-30, 1),
    ("synchronizations", "synchronizations", 1, 0),
)


def gpu_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, a row for each pair, batch size and length."""
    headings = ["receiver, sharer", "batch", "tokens", *(heading for heading, *_ in _COLUMNS)]
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    for row in results:
        cells = [f"{row['receiver']}, {row['sharer']}", str(row["batch_size"]), f"{row['length']:,}"]
        if "missing" in row:
            cells += [row["missing"], *[""] * (len(_COLUMNS) - 1)]
        else:
            for _, key, factor, digits in _COLUMNS:
                value = row.get(key)
                cells.append("" if value is None else f"{factor * value:,.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def card_name(device: str) -> str:
    """Return the name of a device, as it stands in file names."""
    name = "cpu"
    with suppress(RuntimeError, AssertionError):
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return "-".join(name.replace("NVIDIA", "").split()).lower()
