"""Fill the table of one GPU in less than eight minutes, without installing or downloading anything.

    python examples/benchmark_gpu.py                       # tests marked `cuda`, then the table
    python examples/benchmark_gpu.py --device cpu --tiny   # a dry run: tiny shapes, no figures of use

Pairs have the shapes of Qwen3-0.6B, 4B and 8B, and of Qwen2.5-0.5B, with random weights. Writes
`docs/benchmarks/gpu-<card>.json`, and the table into `docs/benchmarks.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from c2c_hf.benchmarks.gpu import (
    BATCH_SIZES,
    LENGTHS,
    PAIRS,
    TINY_BATCH_SIZES,
    TINY_LENGTHS,
    TINY_PAIRS,
    card_name,
    gpu_table,
    run_gpu_benchmark,
)

ROOT = Path(__file__).parents[1]
START, END = "<!-- gpu table -->", "<!-- end of the gpu table -->"
#: Of the whole script.
SECONDS = 460


def write_table(page: Path, table: str, title: str) -> None:
    """Put the table between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page} lacks the marks {START} and {END}.")
    page.write_text(f"{before}{START}\n\n{title}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run the tests, print a line for each setting, and write figures and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmarks.md and benchmarks/")
    options = parser.parse_args()
    start = time.perf_counter()
    tests = "not run"
    if not options.no_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", str(ROOT / "tests")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS / 2)
        tests = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit status {done.returncode}"
        print(f"Tests marked cuda: {tests}", flush=True)
        if done.returncode not in (0, 5):
            print(done.stdout[-4000:], flush=True)
    pairs, lengths, batch_sizes = PAIRS, LENGTHS, BATCH_SIZES
    if options.tiny:
        pairs, lengths, batch_sizes = TINY_PAIRS, TINY_LENGTHS, TINY_BATCH_SIZES
    results = []
    for result in run_gpu_benchmark(
        pairs,
        lengths,
        batch_sizes,
        hidden_size=16 if options.tiny else 1024,
        device=options.device,
        rounds=options.rounds,
        seconds=SECONDS - (time.perf_counter() - start),
    ):
        results.append(result)
        print(json.dumps(result), flush=True)
    card = card_name(options.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    found = {"card": card, "versions": versions, "dtype": "bfloat16", "rounds": options.rounds, "tests": tests}
    target = options.docs / "benchmarks" / f"gpu-{card}.json"
    target.write_text(json.dumps({**found, "results": results}, indent=1) + "\n", encoding="utf-8")
    title = f"{card}, bfloat16, {versions}, medians of {options.rounds} rounds (`python examples/benchmark_gpu.py`):"
    write_table(options.docs / "benchmarks.md", gpu_table(results), title)
    print(f"{time.perf_counter() - start:.0f} s; wrote {target} and the table in benchmarks.md")


if __name__ == "__main__":
    main()
