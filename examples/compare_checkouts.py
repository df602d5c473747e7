"""Time the prefill of two checkouts of this repository in turn, round after round.

    python examples/compare_checkouts.py ../before .                      # the pair that installs from PyPI
    python examples/compare_checkouts.py ../before . --modes fusion --lengths 1024 --dtypes bfloat16 --rounds 21

Each checkout runs in a process of its own, and only one of them works at a time. Every round times a setting once with
each, in alternating order, so that a noisy machine slows both alike. The ratio is the median of the rounds' ratios; in
brackets stand their quartiles. Only what both checkouts have is used: `from_receiver_and_sharers`, `forward` with an
alignment, `demo.local_pair`.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

#: Tokens of the prompt behind the context, in memory mode.
QUESTION = 32


class Setting(NamedTuple):
    """What is timed: a prefill of random tokens up to the first logits."""

    mode: str
    dtype: str
    length: int


class Worker:
    """A process that times settings with one checkout, one after the other."""

    def __init__(self, checkout: Path, *options: str) -> None:
        if not (checkout / "c2c_hf").is_dir():
            raise SystemExit(f"{str(checkout)!r} is no checkout: it has no folder c2c_hf.")
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(checkout.resolve())}
        command = [sys.executable, __file__, "--worker", str(checkout), str(checkout), *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def seconds(self, setting: Setting) -> float:
        """Time one prefill."""
        print(json.dumps(setting), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[3]}: the process ended with status {self.process.wait()}.")
        return float(line)


def work(pair: str, hidden_size: int, device: str, threads: int) -> None:
    """Answer every line of standard input, a setting, with the seconds of one prefill."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    prefills: dict[Setting, Callable[[], object]] = {}
    for line in sys.stdin:
        setting = Setting(*json.loads(line))
        if setting not in prefills:
            # One model at a time: those of the setting before go.
            prefills = {setting: build_prefill(setting, pair, hidden_size, device)}
            prefills[setting]()
        synchronize()
        start = time.perf_counter()
        prefills[setting]()
        synchronize()
        print(time.perf_counter() - start, file=answers, flush=True)


def build_prefill(setting: Setting, pair: str, hidden_size: int, device: str) -> Callable[[], object]:
    """Return a function that prefills a prompt with an untrained fuser whose gates are all open."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    from c2c_hf import C2CConfig, C2CForCausalLM

    dtype = getattr(torch, setting.dtype)
    if pair == "demo":
        from c2c_hf.demo import local_pair

        models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in local_pair()]
    else:
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        configs = [LlamaConfig(num_hidden_layers=3, **sizes), Qwen3Config(num_hidden_layers=5, head_dim=12, **sizes)]
        models = [AutoModelForCausalLM.from_config(config, dtype=dtype) for config in configs]
    fields = {"fuser_hidden_size": hidden_size, "fuser_intermediate_size": hidden_size, "token_alignment": "span"}
    if setting.mode == "memory":
        # The field's name before it was `mode`. Maps of full rank from three layers, which all checkouts have.
        parameters = inspect.signature(C2CConfig).parameters
        fields |= {"mode" if "mode" in parameters else "context_mode": "memory"}
        if "memory_token_embeddings" in parameters:
            fields["memory_token_embeddings"] = 0
    model = C2CForCausalLM.from_receiver_and_sharers(*(base.to(device) for base in models), **fields).eval()
    model.fuser.to(dtype)
    length = setting.length + (QUESTION if setting.mode == "memory" else 0)
    columns = torch.arange(length)
    torch.manual_seed(0)
    for weight_name, weight in model.fuser.named_parameters():
        if "gate_logit" in weight_name:
            weight.data.fill_(1.0)
    ids = torch.randint(10, 96 if pair == "tiny" else 40000, (1, length))
    # Fusion: all positions but the last. Memory: the context, behind the receiver's first token.
    alignment = columns.masked_fill(columns == length - 1, -1)
    if setting.mode == "memory":
        alignment = (columns - 1).masked_fill(columns > setting.length, -1)
    sharer_ids = ids[:, : setting.length]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sharer_input_ids": sharer_ids,
        "sharer_attention_mask": torch.ones_like(sharer_ids),
        "sharer_alignment": alignment[None],
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return torch.no_grad()(lambda: model(**inputs, logits_to_keep=1, use_cache=True))


def summary(setting: Setting, seconds: Mapping[str, list[float]], ratios: list[float], limit: float) -> str:
    """Return a line with medians and spread of both, and the ratio of the second to the first."""
    parts = []
    for name, values in seconds.items():
        median, low, high = (1e3 * value for value in (statistics.median(values), min(values), max(values)))
        parts.append(f"{name} {median:.1f} ms ({low:.1f} to {high:.1f})")
    ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    verdict = f"  OVER {limit}" if ratio > limit else ""
    return f"{' '.join(map(str, setting))}: {'; '.join(parts)}; ratio {ratio:.3f} [{low:.3f}, {high:.3f}]{verdict}"


def main() -> None:
    """Print a line for each setting; exit with 1 where the second checkout is slower than the limit allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="the one to compare with it")
    parser.add_argument("--modes", nargs="+", choices=("fusion", "memory"), default=("fusion", "memory"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="tokens of prompt or context")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=1.1, help="of the ratio of the times, after over before")
    parser.add_argument("--pair", choices=("demo", "tiny"), default="demo", help="tiny: random weights, for tests")
    parser.add_argument("--hidden-size", default="1024", help="of the fuser")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default=str(os.cpu_count()), help="of the processor")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.pair, int(options.hidden_size), options.device, int(options.threads))
        return

    words = ["--pair", options.pair, "--hidden-size", options.hidden_size]
    words += ["--device", options.device, "--threads", options.threads]
    workers = {name: Worker(getattr(options, name), *words) for name in ("before", "after")}
    worst = 0.0
    for setting in (
        Setting(mode, dtype, length)
        for mode in options.modes
        for dtype in options.dtypes
        for length in options.lengths
    ):
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(options.rounds):
            for name in sorted(workers, reverse=number % 2 == 0):
                seconds[name].append(workers[name].seconds(setting))
        ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
        worst = max(worst, statistics.median(ratios))
        print(summary(setting, seconds, ratios, options.limit), flush=True)
    for worker in workers.values():
        worker.process.communicate()
    raise SystemExit(worst > options.limit)


if __name__ == "__main__":
    main()
