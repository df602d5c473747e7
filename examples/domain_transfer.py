"""Does a fuser help in domains that it was not trained on? MMLU-Redux by domain, with the mismatched-sharer control.

python examples/domain_transfer.py general --limit 100 --dtype bfloat16 --data-dir data
"""

import argparse
import json
import tempfile
from pathlib import Path

from datasets import Dataset

from c2c_hf.demo import from_pretrained
from c2c_hf.evaluation.evaluate import evaluate
from c2c_hf.evaluation.tasks.benchmark_data import load

#: Subjects of MMLU-Redux.
DOMAINS = {
    "medicine": ("anatomy", "clinical_knowledge", "college_medicine", "medical_genetics", "professional_medicine"),
    "law": ("international_law", "jurisprudence", "professional_law"),
    "computing": ("college_computer_science", "computer_security", "high_school_computer_science", "machine_learning"),
}
METHODS = ["receiver", "sharer", "c2c", "mismatched"]


def domain_folder(folder: Path, rows: Dataset, subjects: tuple[str, ...]) -> Path:
    """Write the rows of some subjects as the evaluation finds them in a folder."""
    path = folder / "mmlu_redux" / "test.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.dumps(row) for row in rows if row["subject"] in subjects]
    path.write_text("\n".join(lines), encoding="utf-8")
    return folder


def main() -> None:
    """Evaluate domain by domain and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="Hub id or folder, or `general`, which comes with the package")
    parser.add_argument("--data-dir", help="folder of JSON Lines; default: data from the Hub")
    parser.add_argument("--limit", type=int, help="questions of each domain, drawn at random (default: all)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("evaluation/domains"))
    options = parser.parse_args()

    model, processor = from_pretrained(options.fuser, dtype=options.dtype)
    rows = load("mmlu_redux", options.data_dir)["test"]
    print(f"| domain | questions | {' | '.join(METHODS)} | pairing gain |")
    print("| --- " * (len(METHODS) + 3) + "|")
    for domain, subjects in DOMAINS.items():
        with tempfile.TemporaryDirectory() as folder:
            metrics = evaluate(
                model,
                processor,
                options.output / domain,
                tasks=["mmlu_redux"],
                methods=METHODS,
                data_dir=domain_folder(Path(folder), rows, subjects),
                limit=options.limit,
                batch_size=options.batch_size,
            )
        results = {row["method"]: row for row in metrics["results"] if row["metric"] == "accuracy"}
        cells = [f"{100 * results[name]['value']:.1f} {interval(results[name])}" for name in METHODS]
        (gain,) = metrics["pairing_gain"]
        cells.append(f"{100 * gain['value']:+.1f} {interval(gain)}")
        print(f"| {domain} | {gain['num_items']} | {' | '.join(cells)} |", flush=True)


def interval(result: dict) -> str:
    """Format a 95 % interval, in %."""
    return "[{:.1f}, {:.1f}]".format(*(100 * end for end in result["interval"]))


if __name__ == "__main__":
    main()
