"""A benchmark: a pair, and one setting after the other, each with its figures and a line of text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from ..alignment.token_table import apply_token_table, build_token_table
from ..configuration_c2c import check_choice
from ..demo import local_pair, questions
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .cases import (
    benchmark_decode,
    benchmark_memory,
    benchmark_prefill,
    benchmark_training_step,
    open_gates,
    prefill_memory,
)
from .timing import Rounds, time_in_turn

#: Settings and figures by name, as JSON holds them; times in seconds.
Result: TypeAlias = dict[str, Any]
Setting: TypeAlias = Mapping[str, str | int]

PARTS = ("prefill", "decode", "alignment", "training", "memory")
#: Tokens of the text that is aligned, of a training prompt and of its answer.
ALIGNED, PROMPT, ANSWER = 2048, 192, 64
#: What is compared with the context in the prompt.
MEMORY_RATIOS = ("warm_over_prompt", "cold_over_prompt")
#: Width of the residual networks of the memory fuser, as in the one that comes with the package.
MEMORY_HIDDEN_SIZE = 96


#: Sizes of base models for random weights: those of Qwen's, and tiny ones to try a script.
SHAPES: dict[str, PreTrainedConfig] = {
    name: (Qwen2Config if name == "Qwen2.5-0.5B" else Qwen3Config)(
        vocab_size=151936,
        max_position_embeddings=32768,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=name != "Qwen3-8B",
    )
    for name, hidden_size, intermediate_size, num_layers, num_heads, num_key_value_heads, head_dim in (
        ("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 64),
        ("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 128),
        ("Qwen3-4B", 2560, 9728, 36, 32, 8, 128),
        ("Qwen3-8B", 4096, 12288, 36, 32, 8, 128),
        ("tiny-a", 32, 48, 3, 4, 2, 8),
        ("tiny-b", 24, 32, 2, 3, 1, 8),
    )
}


def _demo_pair(dtype: torch.dtype) -> list[PreTrainedModel]:
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in local_pair()]


def _qwen_pair(dtype: torch.dtype) -> list[PreTrainedModel]:
    """Return models of the shapes of Qwen3-0.6B and Qwen2.5-0.5B, with random weights."""
    names = ("Qwen3-0.6B", "Qwen2.5-0.5B")
    return [AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype) for name in names]


PAIRS: dict[str, Callable[[torch.dtype], list[PreTrainedModel]]] = {"demo": _demo_pair, "qwen": _qwen_pair}


def run_benchmark(
    pair: str,
    lengths: Sequence[int],
    batch_sizes: Sequence[int],
    hidden_sizes: Sequence[int],
    parts: Sequence[str] = PARTS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 5,
) -> Iterator[Result]:
    """Time one setting after the other.

    Args:
        pair: One of [`PAIRS`].
        lengths: Tokens of the prompt, or in memory mode of the context.
        batch_sizes: Number of prompts.
        hidden_sizes: Hidden and intermediate size of the fuser; all gates are open.
        parts: Some of [`PARTS`].
        dtype: Of the base models, in which the fuser computes, too; in training it stays in float32.
        device: Of all models.
        rounds: How often each is timed, after one round that does not count.

    Yields:
        `part` and the setting; medians (`..._seconds`), fastest and slowest round (`..._spread`), ratios to the floor,
        and all that as text (`line`).

    Raises:
        ValueError: For an unknown pair or part.
    """
    check_choice("pair", pair, list(PAIRS))
    for part in parts:
        check_choice("parts", part, PARTS)
    receiver, sharer = (model.to(device) for model in PAIRS[pair](dtype))
    dtype_name = str(dtype).removeprefix("torch.")
    for hidden_size in hidden_sizes:
        # The alignment is given with the inputs, so what is timed does not depend on the vocabularies.
        model = C2CForCausalLM.from_receiver_and_sharers(
            receiver,
            sharer,
            token_alignment="span",
            fuser_hidden_size=hidden_size,
            fuser_intermediate_size=hidden_size,
        )
        open_gates(model)
        # As in inference: one copy of its weights.
        model.fuser.to(dtype)
        for batch_size in batch_sizes:
            setting: Setting = {
                "pair": pair,
                "hidden_size": hidden_size,
                "dtype": dtype_name,
                "batch_size": batch_size,
            }
            for length in lengths:
                if "prefill" in parts:
                    yield _prefill(model, length, batch_size, setting, rounds)
                if "decode" in parts and batch_size == 1:
                    yield _decode(model, length, setting, rounds)
            if "training" in parts:
                model.train().fuser.float()
                yield _training(model, batch_size, setting, rounds)
                model.eval().fuser.to(dtype)
    if "alignment" in parts and pair == "demo":
        yield _alignment(rounds)
    if "memory" in parts:
        model = C2CForCausalLM.from_receiver_and_sharers(
            receiver, sharer, mode="memory", memory_hidden_size=MEMORY_HIDDEN_SIZE
        )
        for length in lengths:
            yield _memory(model, length, {"pair": pair, "dtype": dtype_name}, rounds)


def _result(part: str, setting: Setting, timed: Rounds, figures: Mapping[str, int | float], text: str) -> Result:
    names = ("length", "batch_size", "hidden_size")
    where = ", ".join(f"{name.removesuffix('_size')} {setting[name]}" for name in names if name in setting)
    return {
        "part": part,
        **setting,
        **{f"{name}_seconds": timed.median(name) for name in timed.seconds},
        **{f"{name}_spread": timed.spread(name) for name in timed.seconds},
        **figures,
        "line": f"{part:<9} {where}: {text}",
    }


def _milliseconds(timed: Rounds, name: str) -> str:
    fastest, slowest = timed.spread(name)
    return f"{1e3 * timed.median(name):.1f} ms ({1e3 * fastest:.1f} to {1e3 * slowest:.1f})"


def _prefill(model: C2CForCausalLM, length: int, batch_size: int, setting: Setting, rounds: int) -> Result:
    timed = benchmark_prefill(model, length, batch_size, rounds)
    figures = {"over_floor": timed.ratio("fused", "receiver", "sharers", "fuser")}
    parts = ", ".join(f"{name} {_milliseconds(timed, name)}" for name in ("receiver", "sharers", "fuser"))
    text = f"{_milliseconds(timed, 'fused')} = {figures['over_floor']:.3f} x floor; {parts}"
    memory = prefill_memory(model, length, batch_size)
    if memory is not None:
        peak, floor = memory
        figures["memory_over_floor"] = peak / floor
        text += f"; memory {peak / 2**30:.2f} GiB = {peak / floor:.2f} x weights and cache"
    return _result("prefill", {**setting, "length": length}, timed, figures, text)


def _decode(model: C2CForCausalLM, length: int, setting: Setting, rounds: int) -> Result:
    timed = benchmark_decode(model, length, rounds=rounds)
    figures = {"over_receiver": timed.ratio("fused", "receiver")}
    text = f"{_milliseconds(timed, 'fused')} a token = {figures['over_receiver']:.3f} x the receiver's"
    return _result("decode", {**setting, "length": length}, timed, figures, text)


def _training(model: C2CForCausalLM, batch_size: int, setting: Setting, rounds: int) -> Result:
    timed = benchmark_training_step(model, PROMPT, ANSWER, batch_size, rounds)
    figures = {
        "over_floor": timed.ratio("step", "receiver", "sharers", "fuser", "answer"),
        "stored_over_step": timed.ratio("stored", "step"),
    }
    parts = ", ".join(f"{name} {_milliseconds(timed, name)}" for name in ("receiver", "sharers", "fuser", "answer"))
    text = (
        f"{_milliseconds(timed, 'step')} = {figures['over_floor']:.3f} x floor; {parts}; "
        f"with the sharers' caches from disk {figures['stored_over_step']:.3f} x that"
    )
    return _result("training", {**setting, "length": PROMPT}, timed, figures, text)


def _memory(model: C2CForCausalLM, length: int, setting: Setting, rounds: int) -> Result:
    timed, sizes = benchmark_memory(model, length, rounds=rounds)
    figures = {name: timed.ratio(name.removesuffix("_over_prompt"), "prompt") for name in MEMORY_RATIOS} | sizes
    text = (
        f"first token warm {_milliseconds(timed, 'warm')} = {figures['warm_over_prompt']:.3f} x with the context in "
        f"the prompt, cold {_milliseconds(timed, 'cold')} = {figures['cold_over_prompt']:.3f} x; sharer cache "
        f"{sizes['message'] / 1e6:.1f} MB, in 8 bits {sizes['message_int8'] / 1e6:.1f} MB, "
        f"{sizes['message_int8'] / length / 1e3:.1f} kB a token"
    )
    return _result("memory", {**setting, "length": length}, timed, figures, text)


def _alignment(rounds: int) -> Result:
    """Time a table's gather, and the processor with `span` beside the two tokenizations that it contains."""
    receiver, sharer = local_pair()
    processor = C2CProcessor.from_receiver_and_sharers(receiver, sharer)
    tokenizers = (processor.tokenizer, processor.sharer_tokenizers[0])
    table = build_token_table(*tokenizers, "first")
    ids = processor.tokenizer(" ".join(item["question"] for item in questions()) * 20)["input_ids"][:ALIGNED]
    text = processor.tokenizer.decode(ids)
    input_ids = torch.tensor([ids])
    mask = torch.ones_like(input_ids)
    timed = time_in_turn(
        {
            "table": lambda: apply_token_table(table, input_ids, mask, 2),
            "span": lambda: processor(text),
            "tokenizations": lambda: [tokenizer(text, return_tensors="pt") for tokenizer in tokenizers],
        },
        max(rounds, 20),
    )
    figures = {"span_over_tokenizations": timed.ratio("span", "tokenizations")}
    line = (
        f"table {_milliseconds(timed, 'table')}; span {_milliseconds(timed, 'span')} = "
        f"{figures['span_over_tokenizations']:.2f} x the two tokenizations"
    )
    return _result("alignment", {"pair": "demo", "length": len(ids)}, timed, figures, line)


def plot_cost(results: Sequence[Result], path: Path) -> None:
    """Plot the seconds of a prefill and its floor over the length of the prompt, a line for each batch size and fuser.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    prefills = [result for result in results if result["part"] == "prefill"]
    for index, key in enumerate(dict.fromkeys((r["batch_size"], r["hidden_size"]) for r in prefills)):
        rows = sorted(
            (r for r in prefills if (r["batch_size"], r["hidden_size"]) == key), key=lambda result: result["length"]
        )
        lengths = [result["length"] for result in rows]
        label = f"batch {key[0]}, hidden {key[1]}"
        axes.plot(lengths, [r["fused_seconds"] for r in rows], "o-", color=f"C{index}", label=f"{label}: fused")
        floors = [sum(r[f"{part}_seconds"] for part in ("receiver", "sharers", "fuser")) for r in rows]
        axes.plot(lengths, floors, ":", color=f"C{index}", label=f"{label}: floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("seconds of the prefill")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
