"""The command `c2c fit`, which imports what it needs when it runs, as the commands of `cli` do."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_fit_command(commands: Any, positive: Callable[[str], int]) -> None:
    """Add the command to the parser of `c2c`.

    Args:
        commands: The subparsers of `c2c`.
        positive: Type of an argument that is a number from 1 on.
    """
    fit = commands.add_parser(
        "fit",
        help="fit a memory fuser in closed form, without training",
        description="Fit a memory fuser: receiver and sharer read the same texts, and a ridge regression maps the "
        "sharer's states to the receiver's. With several numbers of source layers the best one is kept.",
    )
    fit.add_argument("texts", nargs="+", metavar="FILE", help="JSON Lines, or Hub ids of data sets")
    fit.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the fuser goes")
    fit.add_argument(
        "--receiver", metavar="MODEL", help="Hub id or folder (default: the pair that installs from PyPI)"
    )
    fit.add_argument("--sharer", metavar="MODEL", help="likewise")
    fit.add_argument("--column", default="text", metavar="NAME", help="that holds the texts (default text)")
    fit.add_argument("--max-texts", type=positive, metavar="N", help="of each file (default: all)")
    fit.add_argument("--source-layers", type=positive, nargs="+", default=[3], metavar="N", help="default 3")
    fit.add_argument("--sink-tokens", type=int, default=1, metavar="N", help="in front of the memory (default 1)")
    fit.add_argument("--rank", type=positive, metavar="N", help="of the maps (default: full)")
    fit.add_argument(
        "--shared-bottleneck", action="store_true", help="one of that rank for all layers, from all sharer layers"
    )
    fit.add_argument(
        "--hidden-size", type=int, default=0, metavar="N", help="of a residual network for training (default: none)"
    )
    fit.add_argument(
        "--questions",
        metavar="FILE",
        help="with the columns sharer_context, question, choices and answer: the variance of the "
        "maps' output is scaled as answers them best (default: it is not)",
    )
    fit.add_argument("--max-questions", type=positive, default=60, metavar="N", help="of them (default 60)")
    fit.add_argument("--max-length", type=positive, default=512, metavar="N", help="tokens of a text (default 512)")
    fit.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    fit.add_argument("--device", default="cpu", metavar="DEVICE", help="such as cuda (default cpu)")
    fit.set_defaults(run=_fit)


def _fit(parsed: argparse.Namespace) -> None:
    from ..checkpoints.base_models import load_base_model
    from ..demo.local_pair import local_pair
    from ..fitting.ridge import fit_ridge
    from ..fitting.variance_scaling import choose_variance_scale
    from ..modeling_c2c import C2CForCausalLM
    from ..processing_c2c import C2CProcessor

    if (parsed.receiver is None) != (parsed.sharer is None):
        raise ValueError("give both `--receiver` and `--sharer`, or neither for the pair that installs from PyPI.")
    texts, questions = _texts(parsed), _questions(parsed)
    names = local_pair() if parsed.receiver is None else (parsed.receiver, parsed.sharer)
    options = {"mode": "memory", "memory_sink_tokens": parsed.sink_tokens}
    processor = C2CProcessor.from_receiver_and_sharers(*names, **options)
    loaded = [
        load_base_model(name, role, {"dtype": parsed.dtype})[0].to(parsed.device)
        for name, role in zip(names, ("receiver", "sharers"), strict=True)
    ]
    best = None
    for count in parsed.source_layers:
        fields = {
            **options,
            "memory_source_layers": count,
            "memory_rank": parsed.rank,
            "memory_shared_bottleneck": parsed.shared_bottleneck,
            "memory_hidden_size": parsed.hidden_size,
        }
        model: Any = C2CForCausalLM.from_receiver_and_sharers(loaded[0], loaded[1], **fields)
        report = fit_ridge(model, processor, texts, max_length=parsed.max_length)
        keys, values = (sum(scores) / len(scores) for scores in (report.r2_keys, report.r2_values))
        print(
            f"{count} source layers, {report.num_tokens} tokens: R2 on {report.num_held_out} held-out tokens "
            f"{keys:.3f} (keys), {values:.3f} (values)"
        )
        if best is None or keys + values > best[0]:
            best = (keys + values, model, report)
    if best is not None:
        _, model, report = best
        if questions is not None:
            # Only for the fuser that is kept, since all questions are answered several times.
            power = choose_variance_scale(model, processor, report, questions)
            print(f"Scaled the variance by the power {power:g}.")
        print("layer  keys   values")
        for layer_idx, pair in enumerate(zip(report.r2_keys, report.r2_values, strict=True)):
            print(f"{layer_idx:5}  {pair[0]:5.3f}  {pair[1]:5.3f}")
        model.save_pretrained(parsed.output)
        processor.save_pretrained(parsed.output)
        print(f"Saved the fuser and its processor to {parsed.output}.")


def _texts(parsed: argparse.Namespace) -> list[str]:
    from ..training.dataset import load_rows

    texts: list[str] = []
    for name in parsed.texts:
        rows = load_rows(name)
        if parsed.column not in (rows.column_names or []):
            raise ValueError(f"{name} has the columns {sorted(rows.column_names or [])}; name one with `--column`.")
        column = [row[parsed.column] for row in (rows if parsed.max_texts is None else rows.take(parsed.max_texts))]
        if not all(isinstance(text, str) for text in column):
            raise ValueError(f"The column {parsed.column!r} of {name} must hold texts.")
        texts += column
    return texts


def _questions(parsed: argparse.Namespace) -> list[dict[str, Any]] | None:
    from ..training.dataset import load_rows

    if parsed.questions is None:
        return None
    rows = load_rows(parsed.questions)
    needed = ("sharer_context", "question", "choices", "answer")
    if missing := [name for name in needed if name not in (rows.column_names or [])]:
        raise ValueError(f"{parsed.questions} lacks the columns {missing}; a question needs {list(needed)}.")
    return [dict(row) for row in rows.take(parsed.max_questions)]
