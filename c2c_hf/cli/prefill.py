"""The command of a sharer's machine: `c2c prefill`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Precision, check_place, document_text, load_model, move_to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..processing_c2c import C2CProcessor


def prefill(
    sharer: Annotated[
        str,
        typer.Argument(metavar="SHARER", help="Folder or Hub id of a sharer; or of a memory fuser, for its sharer."),
    ],
    document: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Of the context, such as report.safetensors.")],
    dtype: Precision = "float32",
    device: Device = "cpu",
    int8: Annotated[bool, typer.Option("--int8", help="Round states to 8 bits: a quarter of float32.")] = False,
) -> None:
    """Prefill a sharer with a document, for a receiver elsewhere in memory mode."""
    check_place("the sharer", sharer)
    text = document_text("the document", document)
    model, processor = _load_sharer(sharer, dtype, device)

    from ..serving.context_prompts import prefill_context

    context = prefill_context(model, processor, text)
    output.parent.mkdir(parents=True, exist_ok=True)
    size = len(context.to_safetensors(output, int8=int8))
    print(f"Saved the sharer's cache of {context.input_ids.shape[1]} tokens to {output}, {size / 1e6:.1f} MB.")


def _load_sharer(name: str, dtype: str, device: str) -> "tuple[PreTrainedModel, C2CProcessor]":
    """Load a sharer, and a processor that tokenizes contexts for it as a fuser's does."""
    from transformers import AutoConfig

    from ..checkpoints.base_models import load_base_model, load_tokenizer
    from ..checkpoints.download import shipped_folder
    from ..configuration_c2c import C2CConfig
    from ..processing_c2c import C2CProcessor

    if isinstance(AutoConfig.from_pretrained(shipped_folder(name) or name), C2CConfig):
        model, processor = load_model(name, None, None, dtype=dtype, device=device)
        if model.config.mode != "memory" or model.config.num_sharers != 1:
            raise ValueError(f"the fuser {name!r} must have mode='memory' and one sharer.")
        return model.sharers[0], processor
    sharer, _, _ = load_base_model(name, "sharers", {"dtype": dtype})
    move_to_device(sharer, device)
    tokenizer = load_tokenizer(name, {})
    return sharer, C2CProcessor(tokenizer, tokenizer, mode="memory")
