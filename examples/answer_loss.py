"""Loss per answer token on held-out data, with fusion on and off.

python examples/answer_loss.py my-fuser validation.jsonl --rows 100
"""

import argparse
import tempfile

from c2c_hf import C2CTrainer, C2CTrainingArguments
from c2c_hf.demo import from_pretrained
from c2c_hf.training.dataset import load_rows, prepare_dataset


def main() -> None:
    """Evaluate twice and print both losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="Hub id or folder, or `general`, which comes with the package")
    parser.add_argument("data", help="JSON Lines file or Hub id, as for training")
    parser.add_argument("--rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    model, processor = from_pretrained(options.fuser, dtype=options.dtype)
    rows = load_rows(options.data)
    rows = rows.select(range(min(len(rows), options.rows or len(rows))))
    examples = prepare_dataset(rows, processor, options.max_length, name=options.data)
    with tempfile.TemporaryDirectory() as folder:
        fields = {"per_device_eval_batch_size": options.batch_size, "report_to": "none"}
        arguments = C2CTrainingArguments(folder, bf16=options.dtype == "bfloat16", use_cpu=True, **fields)
        trainer = C2CTrainer(model, arguments, eval_dataset=examples, processing_class=processor)
        fused = trainer.evaluate()["eval_loss"]
        with model.disable_fusion():
            unfused = trainer.evaluate()["eval_loss"]
    print(f"{len(examples)} answers, loss per token: fusion on {fused:.3f}, off {unfused:.3f}")


if __name__ == "__main__":
    main()
