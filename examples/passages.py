"""Log-likelihood of right answers with a passage as sharer-only context: nats per token, paired t-test.

python examples/memory_data.py data dolly/validation.jsonl      # rows with `sharer_context`
python examples/passages.py memory data/passages.jsonl
"""

import argparse

import numpy as np

from c2c_hf.demo import from_pretrained
from c2c_hf.evaluation.memory_report import context_gain_recovered, describe_difference, score_passages
from c2c_hf.training.dataset import load_rows


def main() -> None:
    """Score every answer with four methods, and print means and differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="Hub id or folder; memory: the one that comes with the package")
    parser.add_argument("data", help="JSON Lines file or Hub id with `sharer_context` and `messages`")
    parser.add_argument("--rows", type=int, help="number of passages (default: all)")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, processor = from_pretrained(options.fuser, dtype=options.dtype)
    rows = list(load_rows(options.data))[: options.rows]
    scores = score_passages(model, processor, rows)
    print(f"{len(rows)} answers, nats per token: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in scores.items()))
    for name in ("mismatched", "receiver"):
        print(f"c2c over {name}: {describe_difference(scores['c2c'], scores[name])}")
    recovered = context_gain_recovered(scores)
    if recovered is not None:
        print(f"share of the gain of the passage in the prompt: {recovered:.0%}")


if __name__ == "__main__":
    main()
