"""The command `c2c`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo import add_demo_command
from .evaluate import add_evaluation_commands
from .fit import add_fit_command
from .hub import add_hub_commands

if TYPE_CHECKING:
    from ..modeling_c2c import C2CForCausalLM
    from ..processing_c2c import C2CProcessor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; `None`: those of the process.

    Returns:
        0, or 1 after an error, which is one sentence on standard error; 130 after an interruption.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if parsed.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("c2c_hf").setLevel(logging.DEBUG if parsed.verbose else logging.INFO)
    # Two threads that spin for work slow each other down on small machines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        parsed.run(parsed)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if parsed.verbose:
            raise
        print(f"c2c {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="c2c", description="Language models that communicate through their caches.")
    parser.add_argument("--verbose", action="store_true", help="full error traces and debug messages")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_demo_command(commands, _positive)
    generate = commands.add_parser("generate", help="answer prompts with a saved fuser or an untrained pair")
    _add_model_arguments(generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--context", metavar="TEXT", help="text that only the sharers read")
    generate.add_argument("--plain", action="store_true", help="take prompts as plain text, without chat template")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a saved fuser or an untrained pair; an empty line ends")
    _add_model_arguments(chat)
    chat.set_defaults(run=_chat)

    train = commands.add_parser(
        "train",
        help="train a fuser as a YAML file says",
        description="Train a fuser as a YAML file says. `c2c train CONFIG --help` lists all fields.",
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as those in examples/recipes")
    train.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--FIELD VALUE",
        help="any field, in place of the file's; --resume_from_checkpoint auto goes on where a killed run stopped",
    )
    train.set_defaults(run=_train)

    add_evaluation_commands(commands, _add_model_arguments, _load, _positive)

    convert = commands.add_parser("convert", help="turn checkpoints of the reference into a fuser folder")
    convert.add_argument("checkpoints", nargs="+", metavar="FOLDER", help="one checkpoint folder per sharer")
    convert.add_argument("--output", required=True, metavar="FOLDER", help="where the fuser goes")
    convert.add_argument("--receiver", metavar="MODEL", help="default: the one that the checkpoint names")
    convert.add_argument("--sharer", action="append", metavar="MODEL", help="likewise; once per sharer")
    convert.add_argument("--fusion-mode", choices=("parallel", "sequential"), default="parallel")
    convert.set_defaults(run=_convert)

    analyze = commands.add_parser("analyze", help="report how two tokenizers align on a text")
    analyze.add_argument("receiver", metavar="RECEIVER", help="Hub id or folder")
    analyze.add_argument("sharer", metavar="SHARER", help="Hub id or folder")
    analyze.add_argument("text", type=Path, metavar="FILE", help="UTF-8 text, one sample a line")
    analyze.add_argument("--token-alignment", choices=("identity", "first", "longest", "span"))
    analyze.set_defaults(run=_analyze)

    add_fit_command(commands, _positive)
    add_hub_commands(commands)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser, named: bool = True) -> None:
    if named:
        parser.add_argument(
            "--model", metavar="FUSER", help="Hub id or folder of a fuser; `general`: the one of the package"
        )
    parser.add_argument(
        "--receiver", metavar="MODEL", help="Hub id or folder; with --model, in place of the recorded one"
    )
    parser.add_argument("--sharer", action="append", metavar="MODEL", help="likewise; once per sharer")
    parser.add_argument("--token-alignment", choices=("identity", "first", "longest", "span"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="such as cuda or cuda:1 (default cpu)")
    parser.add_argument("--max-new-tokens", type=_positive, default=64 if named else None, metavar="N")
    if named:
        parser.add_argument("--alone", action="store_true", help="switch fusion off")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {number}")
    return number


def _load(parsed: argparse.Namespace) -> "tuple[C2CForCausalLM, C2CProcessor]":
    from .. import C2CForCausalLM, C2CProcessor

    kwargs: dict[str, Any] = {"dtype": parsed.dtype}
    if parsed.model is not None:
        from ..demo.local_pair import load_fuser

        if parsed.token_alignment is not None:
            raise ValueError(
                "`--token-alignment` goes with `--receiver` and `--sharer`: a saved fuser records its own."
            )
        given = {"receiver": parsed.receiver, "sharers": parsed.sharer}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        model, processor = load_fuser(parsed.model, **kwargs)
    elif parsed.receiver is None or parsed.sharer is None:
        raise ValueError("give `--model`, or both `--receiver` and `--sharer`.")
    else:
        model = C2CForCausalLM.from_receiver_and_sharers(
            parsed.receiver,
            parsed.sharer,
            receiver_kwargs=kwargs,
            sharer_kwargs=kwargs,
            token_alignment=parsed.token_alignment,
        )
        processor = C2CProcessor.from_receiver_and_sharers(parsed.receiver, parsed.sharer, parsed.token_alignment)
        print("The fuser is untrained and closed: the answers are the receiver's own.", file=sys.stderr)
    try:
        model.to(parsed.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device {parsed.device}` cannot be used: {error}") from error
    model.fusion_enabled = not parsed.alone
    return model, processor


def _generate(parsed: argparse.Namespace) -> None:
    model, processor = _load(parsed)
    plain = parsed.plain or processor.tokenizer.chat_template is None
    for prompt in parsed.prompts:
        if plain:
            inputs = processor(prompt, sharer_context=parsed.context, return_tensors="pt")
        else:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                sharer_context=parsed.context,
                return_tensors="pt",
                return_dict=True,
            )
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=parsed.max_new_tokens)
        print(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _chat(parsed: argparse.Namespace) -> None:
    from transformers import TextStreamer

    model, processor = _load(parsed)
    if processor.tokenizer.chat_template is None:
        raise ValueError("the receiver has no chat template; use `c2c generate --plain`.")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        inputs: Any = processor.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=parsed.max_new_tokens, streamer=streamer)
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _train(parsed: argparse.Namespace) -> None:
    from transformers import set_seed

    from ..demo.local_pair import local_pair
    from ..training.recipe import parse_recipe
    from ..training.trainer import C2CTrainer

    model_arguments, data_arguments, arguments = parse_recipe(parsed.config, parsed.overrides)
    # The fuser's first weights come before the trainer sets the seed.
    set_seed(arguments.seed)
    model, processor = model_arguments.load(local_pair() if model_arguments.demo_pair else None)
    with arguments.main_process_first(desc="tokenizing"):
        train_data, eval_data = data_arguments.load(processor, arguments.max_length, arguments.seed)
    adapter = model_arguments.peft_config()
    trainer = C2CTrainer(model, arguments, None, train_data, eval_data, processor, adapter)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Saved the fuser and its processor to {arguments.output_dir}.")


def _convert(parsed: argparse.Namespace) -> None:
    from .. import C2CProcessor, convert_reference_checkpoint

    model = convert_reference_checkpoint(
        parsed.checkpoints, parsed.receiver, parsed.sharer, fusion_mode=parsed.fusion_mode
    )
    model.save_pretrained(parsed.output)
    weights = sum(parameter.numel() for parameter in model.fuser.parameters())
    print(f"Saved a fuser of {weights:,} weights to {parsed.output}.")
    config = model.config
    try:
        processor = C2CProcessor.from_receiver_and_sharers(
            config.receiver_name_or_path, [sharer.name_or_path for sharer in config.sharers], config.token_alignments
        )
    except (OSError, ValueError) as error:
        print(f"No processor saved, because the tokenizers could not be loaded: {error}", file=sys.stderr)
        return
    processor.save_pretrained(parsed.output)


def _analyze(parsed: argparse.Namespace) -> None:
    from dataclasses import asdict

    from .. import C2CProcessor

    processor = C2CProcessor.from_receiver_and_sharers(parsed.receiver, parsed.sharer, parsed.token_alignment)
    texts = [line for line in parsed.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"`{parsed.text}` holds no text.")
    print(
        json.dumps(
            {"token_alignment": processor.token_alignments[0], **asdict(processor.alignment_report(texts))}, indent=2
        )
    )
