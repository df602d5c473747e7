"""How much likelier a passage that only the sharer has read makes the right answer: nats per token, paired t-test.

python examples/memory_data.py data dolly/validation.jsonl      # rows with `sharer_context`
python examples/passages.py memory data/passages.jsonl
"""

import argparse

import numpy as np
import torch
from scipy import stats

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.continuations import continuation_scores
from c2c_hf.demo import load_shipped
from c2c_hf.training_rows import load_rows


def main() -> None:
    """Score every answer four times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="Hub id or folder; memory: the one that comes with the package")
    parser.add_argument("data", help="JSON Lines file or Hub id with `sharer_context` and `messages`")
    parser.add_argument("--rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    if options.fuser == "memory":
        model, processor = load_shipped("memory", dtype=options.dtype)
    else:
        model = C2CForCausalLM.from_pretrained(options.fuser, dtype=options.dtype)
        processor = C2CProcessor.from_pretrained(options.fuser)
    rows = list(load_rows(options.data))[: options.rows]
    scores: dict[str, list[float]] = {"right": [], "mismatched": [], "none": [], "reading": []}
    for index, row in enumerate(rows):
        question, answer = (message["content"] for message in row["messages"])
        passage, other = row["sharer_context"], rows[(index + len(rows) // 2) % len(rows)]["sharer_context"]
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        for name, read, context in (
            ("right", question, passage),
            ("mismatched", question, other),
            ("none", question, None),
            ("reading", f"{passage}\n\n{question}", None),
        ):
            inputs = processor.apply_chat_template([[{"role": "user", "content": read}]], sharer_context=context)
            with torch.no_grad():
                scores[name].append(float(continuation_scores(model, inputs, [[ids]]).logprobs.sum()) / len(ids))
    found = {name: np.array(values) for name, values in scores.items()}
    print(f"{len(rows)} answers, nats per token: " + ", ".join(f"{k} {v.mean():.3f}" for k, v in found.items()))
    for name in ("mismatched", "none"):
        difference = found["right"] - found[name]
        low, high = stats.bootstrap((difference,), np.mean, rng=0).confidence_interval
        p = stats.ttest_rel(found["right"], found[name]).pvalue
        print(f"right over {name}: {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.1e}")
    gain = (found["right"] - found["none"]).mean() / (found["reading"] - found["none"]).mean()
    print(f"share of the gain from reading the passage itself: {gain:.0%}")


if __name__ == "__main__":
    main()
