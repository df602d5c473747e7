"""Count the package's own files that one prompt passes through, from `generate` to the fused cache.

    python examples/trace_prompt.py                          # this checkout
    python examples/trace_prompt.py --checkout ../before     # another one
    python examples/trace_prompt.py --calls                  # every change of file, with both functions

Files: own files in which at least one Python function is called. Changes: calls from one own file into another, where
the caller is the innermost own frame on the stack, whatever torch and transformers put in between. Returns do not
count, nor does the call of `generate` itself; a generator or context manager counts once. Different changes: those
between another pair of functions, so that a call repeated for every layer counts once, as for a reader. The count ends
when the receiver starts its last forward pass of the prefill, the one behind the fused positions or the memory slots.
"""

import argparse
import inspect
import os
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

PROMPT, CONTEXT, VOCAB = 24, 8, 96


class Call(NamedTuple):
    """A call of an own function, each side as (file, function), empty at the entry from outside."""

    caller: tuple[str, str]
    callee: tuple[str, str]


def tiny_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a receiver and a sharer with random weights, unequal in layers, heads and head size."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    receiver = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, num_key_value_heads=2))
    sharer = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=5, num_key_value_heads=1, head_dim=12))
    return receiver.eval(), sharer.eval()


def record_calls(package: Path, run: Callable[[Callable[[], int]], int]) -> list[Call]:
    """Run something and return the calls into a package's files up to the one that it names.

    Args:
        package: The folder of the package.
        run: Takes a function that says how many calls there have been so far; returns how many count.
    """
    root = f"{package}{os.sep}"
    calls: list[Call] = []
    seen: dict[int, FrameType] = {}  # the frames are kept, so that no later one gets the same id

    def place(frame: FrameType | None) -> tuple[str, str]:
        while frame is not None and not frame.f_code.co_filename.startswith(root):
            frame = frame.f_back
        return ("", "") if frame is None else (frame.f_code.co_filename.removeprefix(root), frame.f_code.co_name)

    def note(frame: FrameType, event: str, argument: object) -> None:
        # A generator that goes on is a call event, too.
        if event == "call" and frame.f_code.co_filename.startswith(root) and id(frame) not in seen:
            seen[id(frame)] = frame
            calls.append(Call(place(frame.f_back), place(frame)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        count = run(lambda: len(calls))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls[:count]


def trace(mode: str) -> list[Call]:
    """Return the calls of own functions from `generate` to the fused cache, for a tiny pair.

    Args:
        mode: `"fusion"` or `"memory"`.
    """
    from c2c_hf import C2CConfig, C2CForCausalLM

    # The field's name before it was `mode`, and the value before it was "fusion".
    name = "mode" if "mode" in inspect.signature(C2CConfig).parameters else "context_mode"
    fields = {name: "memory" if mode == "memory" else "fusion" if name == "mode" else "slice"}
    model = C2CForCausalLM.from_receiver_and_sharers(*tiny_pair(), token_alignment="span", **fields)
    with torch.no_grad():
        for weight_name, weight in model.fuser.named_parameters():
            weight.fill_(1.0) if "gate_logit" in weight_name else weight.normal_(0, 0.1)
    ids = torch.randint(3, VOCAB, (1, PROMPT))
    columns = torch.arange(PROMPT).expand(1, -1)
    last = CONTEXT if mode == "memory" else PROMPT - 2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sharer_input_ids": ids[:, : CONTEXT if mode == "memory" else PROMPT],
        # In memory mode the context follows the receiver's first token, its attention sink.
        "sharer_alignment": (columns - int(mode == "memory")).masked_fill(columns > last, -1),
    }
    inputs["sharer_attention_mask"] = torch.ones_like(inputs["sharer_input_ids"])
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    model.generate(**inputs, **options)  # imports and tables come before

    def run(count: Callable[[], int]) -> int:
        starts: list[int] = []
        hook = model.receiver.base_model.register_forward_pre_hook(lambda *arguments: starts.append(count()))
        model.generate(**inputs, **options)
        hook.remove()
        return starts[-1]

    return record_calls(Path(str(find_spec("c2c_hf").origin)).parent, run)


def main() -> None:
    """Print files, changes of file and the order of the files for both modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="of this repository (default: the installed package)")
    parser.add_argument("--calls", action="store_true", help="print every change of file")
    options = parser.parse_args()
    if options.checkout:
        sys.path.insert(0, str(options.checkout.resolve()))
    for mode in ("fusion", "memory"):
        calls = trace(mode)
        changes = [call for call in calls if call.caller[0] not in ("", call.callee[0])]
        visits: dict[str, int] = {}
        for call in calls:
            visits.setdefault(call.callee[0], 0)
        for call in changes:
            visits[call.callee[0]] += 1
        print(
            f"{mode}: {len(visits)} files, {len(changes)} changes of file ({len(set(changes))} different), "
            f"{len(calls)} calls"
        )
        for file, entered in visits.items():
            print(f"  {file:<36} entered {entered} times from other own files")
        if options.calls:
            for caller, callee in changes:
                print(f"  {caller[0]}:{caller[1]} -> {callee[0]}:{callee[1]}")


if __name__ == "__main__":
    main()
