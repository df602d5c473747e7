"""The settings of a benchmark, one after the other; what to time is in `benchmarking`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from ..alignment.token_table import apply_token_table
from ..demo.local_pair import local_pair, questions
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .measure import (
    Rounds,
    benchmark_decode,
    benchmark_memory,
    benchmark_prefill,
    benchmark_training_step,
    open_gates,
    peak_memory,
    time_in_turn,
)

PARTS = ("prefill", "decode", "alignment", "training", "memory")
#: Tokens of the text that is aligned, of a training prompt and of its answer.
ALIGNED, PROMPT, ANSWER = 2048, 192, 64
#: Width of the memory fuser's bottleneck, as that of the one that comes with the package.
MEMORY_RANK = 160


def _demo_pair(dtype: torch.dtype) -> list[PreTrainedModel]:
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in local_pair()]


def _qwen_pair(dtype: torch.dtype) -> list[PreTrainedModel]:
    """Return models of the shapes of Qwen3-0.6B and Qwen2.5-0.5B, with random weights."""
    shared = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
    receiver = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        **shared,
    )
    sharer = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        **shared,
    )
    return [AutoModelForCausalLM.from_config(config, dtype=dtype) for config in (receiver, sharer)]


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
) -> Iterator[dict[str, Any]]:
    """Time one setting after the other.

    Args:
        pair: Of [`PAIRS`].
        lengths: Tokens of the prompt.
        batch_sizes: Rows.
        hidden_sizes: Of the fuser, its intermediate size too; all gates are open.
        parts: Of [`PARTS`].
        dtype: Of the base models; the fuser computes in it, too, but for training.
        device: Of everything.
        rounds: How often each is timed, after one time that does not count.

    Yields:
        `part` and the setting; medians (`..._seconds`), fastest and slowest round (`..._spread`), ratios to the floor,
        and all that in words (`line`).

    Raises:
        ValueError: For an unknown pair or part.
    """
    for name, value, known in (("pair", [pair], PAIRS), ("parts", parts, PARTS)):
        if unknown := [one for one in value if one not in known]:
            raise ValueError(f"`{name}` must be among {list(known)}, but got {unknown}.")
    models, dtype_name = [model.to(device) for model in PAIRS[pair](dtype)], str(dtype).removeprefix("torch.")
    for hidden_size in hidden_sizes:
        sizes: dict[str, Any] = {"fuser_hidden_size": hidden_size, "fuser_intermediate_size": hidden_size}
        # Equal lengths, each position reading its own: what is timed does not depend on the vocabularies.
        model = C2CForCausalLM.from_receiver_and_sharers(models[0], models[1], token_alignment="span", **sizes)
        open_gates(model)
        # As at inference: one copy of its weights.
        model.fuser.to(dtype)
        setting = {"pair": pair, "hidden_size": hidden_size, "dtype": dtype_name}
        for batch_size in batch_sizes:
            for length in lengths:
                here = {**setting, "length": length, "batch_size": batch_size}
                if "prefill" in parts:
                    yield _prefill(model, here, rounds)
                if "decode" in parts and batch_size == 1:
                    yield _decode(model, here, rounds)
            if "training" in parts:
                model.train().fuser.float()
                yield _training(model, {**setting, "length": PROMPT, "batch_size": batch_size}, rounds)
                model.eval().fuser.to(dtype)
    if "alignment" in parts and pair == "demo":
        yield _alignment(rounds)
    if "memory" in parts:
        fields: dict[str, Any] = {"memory_shared_bottleneck": True, "memory_rank": MEMORY_RANK}
        remembering = C2CForCausalLM.from_receiver_and_sharers(*models, mode="memory", **fields)
        for length in lengths:
            yield _memory(remembering, {"pair": pair, "length": length, "dtype": dtype_name}, rounds)


def _result(part: str, setting: dict[str, Any], timed: Rounds, ratios: dict[str, float], words: str) -> dict[str, Any]:
    seconds = {f"{name}_seconds": timed.median(name) for name in timed.seconds}
    spreads = {f"{name}_spread": timed.spread(name) for name in timed.seconds}
    where = ", ".join(f"{name} {setting[name]}" for name in ("length", "batch_size", "hidden_size") if name in setting)
    line = f"{part:<9} {where.replace('_size', '')}: {words}"
    return {"part": part, **setting, **seconds, **spreads, **ratios, "line": line}


def _milliseconds(timed: Rounds, name: str) -> str:
    fastest, slowest = timed.spread(name)
    return f"{1e3 * timed.median(name):.1f} ms ({1e3 * fastest:.1f} to {1e3 * slowest:.1f})"


def _prefill(model: C2CForCausalLM, setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    timed = benchmark_prefill(model, setting["length"], setting["batch_size"], rounds)
    ratios = {"over_floor": timed.ratio("fused", "receiver", "sharers", "fuser")}
    parts = ", ".join(f"{name} {_milliseconds(timed, name)}" for name in ("receiver", "sharers", "fuser"))
    words = f"{_milliseconds(timed, 'fused')} = {ratios['over_floor']:.3f} x floor; {parts}"
    memory = peak_memory(model, setting["length"], setting["batch_size"])
    if memory is not None:
        ratios["memory_over_floor"] = memory[0] / memory[1]
        words += f"; memory {memory[0] / 2**30:.2f} GiB = {ratios['memory_over_floor']:.2f} x weights and cache"
    return _result("prefill", setting, timed, ratios, words)


def _decode(model: C2CForCausalLM, setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    timed = benchmark_decode(model, setting["length"], rounds=rounds)
    ratios = {"over_receiver": timed.ratio("fused", "receiver")}
    words = f"{_milliseconds(timed, 'fused')} a token = {ratios['over_receiver']:.3f} x the receiver's"
    return _result("decode", setting, timed, ratios, words)


def _training(model: C2CForCausalLM, setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    timed = benchmark_training_step(model, PROMPT, ANSWER, setting["batch_size"], rounds)
    ratios = {
        "over_floor": timed.ratio("step", "receiver", "sharers", "fuser", "answer"),
        "stored_over_step": timed.ratio("stored", "step"),
    }
    parts = ", ".join(f"{name} {_milliseconds(timed, name)}" for name in ("receiver", "sharers", "fuser", "answer"))
    words = (
        f"{_milliseconds(timed, 'step')} = {ratios['over_floor']:.3f} x floor; {parts}; with the sharers' states from "
        f"a disk {ratios['stored_over_step']:.3f} x that"
    )
    return _result("training", setting, timed, ratios, words)


def _memory(model: C2CForCausalLM, setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    timed, sizes = benchmark_memory(model, setting["length"], rounds=rounds)
    ratios = {"over_reading": timed.ratio("remembering", "reading"), **sizes}
    words = (
        f"first token {_milliseconds(timed, 'remembering')} = {ratios['over_reading']:.3f} x the receiver reading it; "
        f"states {sizes['states'] / 1e6:.1f} MB, in 8 bits {sizes['states_int8'] / 1e6:.1f} MB"
    )
    return _result("memory", setting, timed, ratios, words)


def _alignment(rounds: int) -> dict[str, Any]:
    """Time a table's gather, and the processor with `span` against the two tokenizations that it cannot do without."""
    receiver, sharer = local_pair()
    spans = C2CProcessor.from_receiver_and_sharers(receiver, sharer)
    table: Any = C2CProcessor.from_receiver_and_sharers(receiver, sharer, "first").token_tables[0]
    ids = spans.tokenizer(" ".join(item["question"] for item in questions()) * 20)["input_ids"][:ALIGNED]
    text = spans.tokenizer.decode(ids)
    tensor = torch.tensor([ids])
    mask = torch.ones_like(tensor)
    tokenizers = (spans.tokenizer, spans.sharer_tokenizers[0])
    timed = time_in_turn(
        {
            "table": lambda: apply_token_table(table, tensor, mask, 2),
            "span": lambda: spans(text),
            "tokenizations": lambda: [tokenizer(text, return_tensors="pt") for tokenizer in tokenizers],
        },
        max(rounds, 20),
    )
    ratios = {"span_over_tokenizations": timed.ratio("span", "tokenizations")}
    words = (
        f"table {_milliseconds(timed, 'table')}; span {_milliseconds(timed, 'span')} = "
        f"{ratios['span_over_tokenizations']:.2f} x the two tokenizations"
    )
    return _result("alignment", {"pair": "demo", "length": len(ids)}, timed, ratios, words)


def plot_cost(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the prefill's cost and its floor against the length of the prompt, a line for each batch and fuser.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    prefills = [result for result in results if result["part"] == "prefill"]
    for index, key in enumerate(dict.fromkeys((r["batch_size"], r["hidden_size"]) for r in prefills)):
        mine = sorted(
            (r for r in prefills if (r["batch_size"], r["hidden_size"]) == key), key=lambda result: result["length"]
        )
        lengths = [result["length"] for result in mine]
        label = f"batch {key[0]}, hidden {key[1]}"
        axes.plot(lengths, [r["fused_seconds"] for r in mine], "o-", color=f"C{index}", label=f"{label}: fused")
        floors = [sum(r[f"{part}_seconds"] for part in ("receiver", "sharers", "fuser")) for r in mine]
        axes.plot(lengths, floors, ":", color=f"C{index}", label=f"{label}: floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("seconds of the prefill")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
