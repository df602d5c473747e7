"""How much likelier a passage that only the sharer has read makes the right answer: nats per token, paired t-test.

python examples/memory_data.py data dolly/validation.jsonl      # rows with `sharer_context`
python examples/passages.py memory data/passages.jsonl
"""

import argparse

import numpy as np

from c2c_hf.demo.local_pair import load_fuser
from c2c_hf.evaluation.passages import score_difference, score_passages, share_of_reading
from c2c_hf.training.rows import load_rows


def main() -> None:
    """Score every answer four times and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="Hub id or folder; memory: the one that comes with the package")
    parser.add_argument("data", help="JSON Lines file or Hub id with `sharer_context` and `messages`")
    parser.add_argument("--rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, processor = load_fuser(options.fuser, dtype=options.dtype)
    rows = list(load_rows(options.data))[: options.rows]
    scores = score_passages(model, processor, rows)
    print(f"{len(rows)} answers, nats per token: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in scores.items()))
    for name in ("mismatched", "none"):
        print(f"right over {name}: {score_difference(scores['right'], scores[name])}")
    print(f"share of the gain from reading the passage itself: {share_of_reading(scores):.0%}")


if __name__ == "__main__":
    main()
