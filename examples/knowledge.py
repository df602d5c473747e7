"""Does same-text fusion carry what a sharer knows? Teach one made-up facts, train a fuser, ask about other people.

    python examples/knowledge.py knowledge

1. *teach*: a LoRA on the sharer learns the facts about all people, until it knows them; it is merged.
2. *train*: a fuser from the taught sharer to the receiver is trained on questions about all people but 200.
3. *test*: 500 questions about these 200, in other wordings, twelve choices each and free answers: with the right
   sharer, with one that prefills the question about another person, with the sharer before it was taught, the
   receiver alone, and the taught sharer itself. `--controls` adds a LoRA on the receiver and a fuser of the receiver
   onto itself, trained on the same questions.

Every step continues where it was interrupted. `--train-people`, `--steps`, `--seed` and the options of the fuser make
further fusers (name each by `--name`) for the same taught sharer.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, set_seed

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments, fit_layer_mapping
from c2c_hf.demo import local_pair
from c2c_hf.evaluation.evaluate import evaluate
from c2c_hf.evaluation.tasks.taught_facts import fuser_rows, teaching_rows
from c2c_hf.training.dataset import prepare_dataset

METHODS = ("receiver", "sharer", "c2c", "mismatched", "shuffled", "zero")
CONTROLS = ("receiver_with_adapter", "receiver_as_sharer")
TASKS = ("taught_facts", "taught_facts_generate")
#: Long enough for every question with its answer.
MAX_LENGTH = 64
LORA = LoraConfig(r=32, lora_alpha=64, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj")


class StopAtLoss(TrainerCallback):
    """Stops when the mean of the last `window` logged losses is below `loss`: facts are known before they are seen."""

    def __init__(self, loss: float, window: int = 5) -> None:
        self.loss, self.window = loss, window

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the losses that are logged so far."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry][-self.window :]
        control.should_training_stop = len(losses) == self.window and sum(losses) / self.window < self.loss


def arguments_of(options: argparse.Namespace, folder: Path, max_steps: int, **fields: Any) -> C2CTrainingArguments:
    """Return the training arguments that both trainings share."""
    return C2CTrainingArguments(
        str(folder),
        max_steps=max_steps,
        max_length=MAX_LENGTH,
        gate_noise="none",
        bf16=options.dtype == "bfloat16",
        save_steps=options.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        **fields,
    )


def teach(options: argparse.Namespace, sharer: str, taught: Path) -> None:
    """Train a LoRA on all facts, merge it, and save the sharer.

    The trainer of fusers does it: the sharer is the receiver of a pair whose fusion is off.
    """
    kwargs = {"dtype": options.dtype}
    sizes = {"fuser_hidden_size": 8, "fuser_intermediate_size": 8}
    set_seed(0)
    model = C2CForCausalLM.from_receiver_and_sharers(sharer, sharer, kwargs, kwargs, **sizes)
    processor = C2CProcessor.from_receiver_and_sharers(sharer, sharer)
    # Further passes repeat these rows in another order.
    rows = Dataset.from_list(teaching_rows(options.people, min(4, options.teach_passes)))
    examples = prepare_dataset(rows, processor, MAX_LENGTH, plain_text=True)
    arguments = arguments_of(
        options,
        taught.with_name("teaching"),
        options.teach_passes * 3 * options.people // options.teach_batch_size,
        per_device_train_batch_size=options.teach_batch_size,
        learning_rate=options.teach_learning_rate,
        warmup_steps=20,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        logging_steps=5,
        train_fuser=False,
    )
    trainer = C2CTrainer(model, arguments, train_dataset=examples, processing_class=processor, peft_config=LORA)
    trainer.add_callback(StopAtLoss(options.teach_loss))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    merge(sharer, taught.with_name("teaching") / "receiver_adapter", taught)


def merge(sharer: str, adapter: Path, taught: Path) -> None:
    """Add the LoRA to the sharer's weights, and save the sum with the sharer's tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(sharer, dtype="float32")
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(taught)
    AutoTokenizer.from_pretrained(sharer).save_pretrained(taught)


def train(
    options: argparse.Namespace, receiver: str, sharer: str, fuser: Path, peft_config: LoraConfig | None = None
) -> None:
    """Train a fuser, or an adapter of the receiver in its place, on questions about people who are not in the test."""
    if (fuser / "model.safetensors").is_file():
        return
    kwargs = {"dtype": options.dtype}
    set_seed(options.seed)
    model = C2CForCausalLM.from_receiver_and_sharers(
        receiver,
        sharer,
        kwargs,
        kwargs,
        fuser_type=options.fuser_type,
        fuser_hidden_size=options.hidden_size,
        fuser_intermediate_size=options.hidden_size,
        fuser_dropout=options.dropout,
        fuser_initialization="zero_output",
        layer_alignment=options.layer_alignment,
        fusion_source_layers=options.source_layers,
        joint_keys_values=options.joint_keys_values,
        unrotate_keys=options.unrotate_keys,
    )
    processor = C2CProcessor.from_receiver_and_sharers(receiver, sharer)
    people = options.train_people or options.people
    passes = options.steps * options.batch_size // len(fuser_rows(people)) + 1
    rows = Dataset.from_list(fuser_rows(people, passes, options.seed))
    if options.layer_alignment == "learned":
        fit_layer_mapping(model, processor, rows["prompt"][:400])
    examples = prepare_dataset(rows, processor, MAX_LENGTH, plain_text=True)
    arguments = arguments_of(
        options,
        fuser,
        options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=0.05,
        weight_decay=options.weight_decay,
        lr_scheduler_type="linear",
        logging_steps=10,
        train_sampling_strategy="sequential",
        train_fuser=peft_config is None,
    )
    trainer = C2CTrainer(model, arguments, train_dataset=examples, processing_class=processor, peft_config=peft_config)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()


def load(options: argparse.Namespace, fuser: Path, sharer: str | None = None) -> tuple[C2CForCausalLM, C2CProcessor]:
    """Load a fuser, with another sharer where one is given."""
    model = C2CForCausalLM.from_pretrained(
        str(fuser), sharers=sharer, dtype=options.dtype, verify_base_models=sharer is None
    )
    return model, C2CProcessor.from_pretrained(str(fuser))


def test(options: argparse.Namespace, sharer: str, fuser: Path) -> None:
    """Ask about the people of the test, and print a table."""
    fields: dict[str, Any] = {"tasks": TASKS, "limit": options.limit, "batch_size": 32, "chat": False}
    methods, controls = list(options.methods), {}
    if options.controls:
        methods += CONTROLS
        controls = {"adapter": str(beside(fuser, "lora")), "self_fuser": load(options, beside(fuser, "self"))}
    found = evaluate(*load(options, fuser), fuser / "evaluation", methods=methods, **controls, **fields)["results"]
    untaught = evaluate(*load(options, fuser, sharer), fuser / "evaluation_untaught", methods=["c2c"], **fields)
    found += [{**row, "method": "c2c, untaught sharer"} for row in untaught["results"]]
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in found:
        low, high = (100 * end for end in row["interval"])
        cell = f"{100 * row['value']:.1f} [{low:.1f}, {high:.1f}]"
        cells.setdefault(row["method"], {})[row["task"], row["metric"]] = cell
    print(f"| {found[0]['num_items']} questions, % right | of 12 choices | free answers | names the other's fact |")
    print("| --- | --- | --- | --- |")
    columns = [(TASKS[0], "accuracy"), (TASKS[1], "accuracy"), (TASKS[0], "mismatched_answer")]
    for method, row in cells.items():
        print(f"| {method} | {' | '.join(row[column] for column in columns)} |")


def beside(fuser: Path, control: str) -> Path:
    """Return the folder of a control that was trained on the same questions as a fuser."""
    return fuser.with_name(f"{fuser.name}-{control}")


def main() -> None:
    """Teach, train and test, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the taught sharer, the fusers and their evaluations")
    parser.add_argument("--stage", choices=("teach", "train", "test", "all"), default="all")
    parser.add_argument("--receiver", help="Hub id or folder (default: that of the pair that installs from PyPI)")
    parser.add_argument("--sharer", help="the same")
    parser.add_argument("--dtype", default="bfloat16", help="of the base models")
    parser.add_argument("--people", type=int, default=600, help="who the sharer is taught")
    parser.add_argument("--teach-passes", type=int, default=16, help="at most so many rows per fact")
    parser.add_argument("--teach-loss", type=float, default=0.03, help="stop below it")
    parser.add_argument("--teach-learning-rate", type=float, default=4e-4)
    parser.add_argument("--teach-batch-size", type=int, default=24)
    parser.add_argument("--name", default="fuser", help="folder of the fuser inside the output folder")
    parser.add_argument("--train-people", type=int, help="train on fewer: the test's 200 and so many less 200")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--fuser-type", default="c2c")
    parser.add_argument("--layer-alignment", default="depth_normalized")
    parser.add_argument("--source-layers", type=int, default=1, help="with `learned`, of each receiver layer")
    parser.add_argument("--joint-keys-values", action="store_true")
    parser.add_argument("--unrotate-keys", action="store_true")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--limit", type=int, default=500, help="number of test questions")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--controls", action="store_true", help=f"train and evaluate {' and '.join(CONTROLS)} as well")
    options = parser.parse_args()

    receiver, sharer = options.receiver, options.sharer
    if receiver is None or sharer is None:
        receiver, sharer = local_pair()
    taught, fuser = options.output / "taught", options.output / options.name
    if options.stage in ("teach", "all") and not taught.is_dir():
        teach(options, sharer, taught)
    if options.stage in ("train", "all"):
        train(options, receiver, str(taught), fuser)
        if options.controls:
            train(options, receiver, str(taught), beside(fuser, "lora"), LORA)
            train(options, receiver, receiver, beside(fuser, "self"))
    if options.stage in ("test", "all"):
        test(options, sharer, fuser)


if __name__ == "__main__":
    main()
