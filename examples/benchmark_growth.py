"""How the cost of C2C's own parts grows with the length of the text and the number of sharers, as fitted exponents.

    python examples/benchmark_growth.py --json docs/benchmarks/growth.json

Models are tiny, so that what is measured is this package and attention, not their products. Seconds are the CPU time
of one thread, which other processes hardly change. An exponent of 1 is cost in proportion to the length.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import linregress
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.alignment.token_table import apply_token_table, build_token_table
from c2c_hf.benchmarks.cases import open_gates, random_prompt
from c2c_hf.inference.fusion import aligned_tokens, fuse_states
from c2c_hf.inference.inputs import ReceiverInputs, SharerInputs
from c2c_hf.inference.memory_slots import fill_memory_slots, plan_memory_slots
from c2c_hf.inference.prefill import cached_states, full_length_cache, prefill
from c2c_hf.inference.sharer_cache import prefill_sharer

DOCUMENTS = Path(__file__).parent / "documents"
VOCABULARY, SHARERS_AT = 300, 2048


def tiny_model(config_class: type, num_layers: int, length: int) -> PreTrainedModel:
    """Build a model of the least width."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = config_class(
        vocab_size=VOCABULARY, num_hidden_layers=num_layers, head_dim=8, max_position_embeddings=length + 64, **sizes
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer_of(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on a text."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator([text], vocab_size=vocab_size, min_frequency=2)
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)


def cpu_seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median CPU time of functions that are called in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(1 + rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if number > 0:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def seconds_of(
    receiver: PreTrainedModel, sharers: list[PreTrainedModel], length: int, rounds: int
) -> dict[str, float]:
    """Time prefills, the fusing, and the filling of slots, of a prompt of this length."""
    fields = {"token_alignment": "span", "fuser_hidden_size": 16, "fuser_intermediate_size": 16}
    model = C2CForCausalLM.from_receiver_and_sharers(receiver, sharers, **fields)
    memory = C2CForCausalLM.from_receiver_and_sharers(receiver, sharers, mode="memory", memory_source_layers=1)
    open_gates(model)
    inputs = random_prompt(model, length, 1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    caches = [prefill_sharer(sharer, ids, mask) for sharer in sharers]
    scratch = full_length_cache()
    prefill(receiver, scratch, ids, mask)
    states = cached_states(scratch)
    tokens = [aligned_tokens(inputs["sharer_alignment"])] * len(sharers)
    # Each sharer fills its own part of the slots.
    columns, share = torch.arange(length), math.ceil((length - 2) / len(sharers))
    slots = [
        columns.masked_fill((columns < 1 + i * share) | (columns >= min(length - 1, 1 + (i + 1) * share)), -1)[None]
        for i in range(len(sharers))
    ]
    plan = plan_memory_slots(slots, mask.bool(), [length] * len(sharers), 1, False)
    assert plan is not None
    new = ReceiverInputs(ids, None, mask, None).with_positions()
    given = [SharerInputs(ids, mask, alignment) for alignment in slots]
    rotations, embedding = memory.rotations(), receiver.get_input_embeddings()
    return cpu_seconds(
        {
            "receiver's prefill": lambda: prefill(receiver, full_length_cache(), ids, mask),
            "fusion": lambda: fuse_states(list(model.fuser), caches, states, tokens, "parallel"),
            "memory slots": lambda: fill_memory_slots(
                plan,
                list(memory.fuser),
                caches,
                given,
                rotations,
                new,
                embedding,
                [],
                torch.float32,
            ),
        },
        rounds,
    )


def alignment_seconds(text: str, lengths: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Time the token table's gather and the span alignment with its two tokenizations."""
    receiver, sharer = tokenizer_of(text, VOCABULARY), tokenizer_of(text, 2 * VOCABULARY)
    table = build_token_table(receiver, sharer, "first")
    processor = C2CProcessor(receiver, sharer, token_alignment="span")
    ids = receiver(text * math.ceil(lengths[-1] / len(receiver(text)["input_ids"])))["input_ids"]
    found: dict[str, dict[int, float]] = {"token table": {}, "span alignment": {}}
    for length in lengths:
        part, whole = torch.tensor([ids[:length]]), receiver.decode(ids[:length])
        timed = cpu_seconds(
            {
                "token table": lambda part=part: apply_token_table(table, part, torch.ones_like(part), None),
                "span alignment": lambda whole=whole: processor(whole),
            },
            rounds,
        )
        for name, values in found.items():
            values[length] = timed[name]
    return found


def exponent(seconds: dict[int, float]) -> tuple[float, float]:
    """Return the slope of log seconds over log size, and its standard error."""
    fit = linregress([math.log(size) for size in seconds], [math.log(value) for value in seconds.values()])
    return float(fit.slope), float(fit.stderr)


def table_of(found: dict[str, dict[int, float]], unit: str) -> str:
    """Return the medians and exponents as a Markdown table."""
    sizes = list(next(iter(found.values())))
    lines = [
        f"| ms | {' | '.join(f'{size:,} {unit}' for size in sizes)} | exponent |",
        f"|{' --- |' * (len(sizes) + 2)}",
    ]
    for name, seconds in found.items():
        slope, error = exponent(seconds)
        values = " | ".join(f"{1e3 * value:,.2f}" for value in seconds.values())
        lines.append(f"| {name} | {values} | {slope:.2f} ± {error:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(10, 16)])
    parser.add_argument("--sharers", type=int, nargs="+", default=[1, 2, 4, 8], help=f"at {SHARERS_AT} tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    longest = max([*options.lengths, SHARERS_AT])
    receiver = tiny_model(LlamaConfig, 1, longest)
    sharers = [tiny_model(Qwen3Config, 1, longest) for _ in range(max(options.sharers))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.glob("*.txt")))

    by_length: dict[str, dict[int, float]] = {}
    for length in options.lengths:
        for name, value in seconds_of(receiver, sharers[:1], length, options.rounds).items():
            by_length.setdefault(name, {})[length] = value
    by_length |= alignment_seconds(text, options.lengths, options.rounds)
    print(table_of(by_length, "tokens"), end="\n\n")
    by_sharers: dict[str, dict[int, float]] = {}
    at = min(SHARERS_AT, longest)
    for count in options.sharers:
        for name, value in seconds_of(receiver, sharers[:count], at, options.rounds).items():
            if name != "receiver's prefill":
                by_sharers.setdefault(name, {})[count] = value
    print(table_of(by_sharers, "sharers"))
    if options.json:
        found = {"rounds": options.rounds, "length": by_length, f"sharers at {at} tokens": by_sharers}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
