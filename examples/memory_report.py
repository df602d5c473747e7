r"""Evaluate memory fusers in one table: private facts and real passages as sharer-only contexts.

    python examples/memory_data.py data dolly/train.jsonl --min-characters 800 --max-characters 2000
    python examples/memory_report.py report memory my-fuser --fusion-fuser general --passages data/passages.jsonl

Called again with the same folder it continues an interrupted run.
"""

import argparse
from pathlib import Path

from c2c_hf.demo import from_pretrained
from c2c_hf.evaluation.memory_report import memory_report
from c2c_hf.training.dataset import load_rows


def main() -> None:
    """Answer what the folder does not hold yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the answers")
    parser.add_argument("fusers", nargs="+", help="Hub ids or folders; memory: the one that comes with the package")
    parser.add_argument("--fusion-fuser", help="a fuser with mode=fusion, for comparison")
    parser.add_argument("--passages", help="JSON Lines file or Hub id with `sharer_context` and `messages`")
    parser.add_argument("--rows", type=int, help="number of passages (default: all)")
    parser.add_argument("--limit", type=int, help="number of facts (default: 500 for each of three seeds)")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    rows = [] if options.passages is None else list(load_rows(options.passages))[: options.rows]
    fusion_fuser = options.fusion_fuser and from_pretrained(options.fusion_fuser, dtype=options.dtype)
    fusers = ((Path(name).name, from_pretrained(name, dtype=options.dtype)) for name in options.fusers)
    for line in memory_report(fusers, options.output, rows, fusion_fuser, limit=options.limit):
        print(line, flush=True)


if __name__ == "__main__":
    main()
