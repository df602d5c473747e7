"""Compare a fuser with its receiver, its sharer and the mismatched-sharer control on one benchmark.

python examples/evaluate_fuser.py my-fuser --data-dir data --limit 100
"""

import argparse

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.evaluation.evaluate import evaluate


def main() -> None:
    """Answer the same questions by four methods, and print accuracies and the pairing gain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fuser", help="folder or Hub id")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--data-dir", help="folder of JSON Lines; default: data from the Hub")
    parser.add_argument("--limit", type=int, help="number of questions")
    parser.add_argument("--output", default="evaluation/example")
    arguments = parser.parse_args()

    model = C2CForCausalLM.from_pretrained(arguments.fuser)
    processor = C2CProcessor.from_pretrained(arguments.fuser)
    metrics = evaluate(
        model,
        processor,
        arguments.output,
        tasks=[arguments.task],
        methods=["receiver", "sharer", "c2c", "mismatched"],
        data_dir=arguments.data_dir,
        limit=arguments.limit,
    )
    for result in metrics["results"]:
        print(f"{result['method']:<12} {100 * result['value']:.1f} % of {result['num_items']}")
    (gain,) = metrics["pairing_gain"]
    low, high = gain["interval"]
    print(f"pairing gain {100 * gain['value']:+.1f} points, 95 % interval [{100 * low:+.1f}, {100 * high:+.1f}]")


if __name__ == "__main__":
    main()
