"""Methods by name, and how each is built from a C2C model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoModelForCausalLM, PreTrainedModel

from ...checkpoints.receiver_adapter import ADAPTER_FOLDER, add_adapter, has_adapter
from ...modeling_c2c import C2CForCausalLM
from ...processing_c2c import C2CProcessor
from .answerer import Answerer, Method, ModelAnswerer
from .baselines import TextToText
from .c2c_answerer import C2CAnswerer, SharerPrefills
from .controls import CONTROLS
from .payload_ablations import PAYLOAD_ABLATIONS

#: A fuser with its base models, and its processor.
ModelWithProcessor: TypeAlias = tuple[C2CForCausalLM, C2CProcessor]

#: Every method with its description, for the command line and the report.
METHODS = {
    "receiver": "the receiver without fusion, context or adapter",
    "receiver_with_context": "the receiver without fusion, the context in its prompt",
    "receiver_with_adapter": "the receiver with a LoRA adapter, the fuser's own unless another is given",
    "sharer": "each sharer without fusion, with its own tokenizer and chat template, the context in its prompt",
    "text_to_text": "the first sharer generates a sentence of background for the receiver's prompt",
    "routing": "the half of the questions that the receiver is least sure of is answered by the largest sharer",
    "c2c": "the receiver with the sharers' caches fused in",
    "same_text_fusion": "C2C by another fuser with mode='fusion', whose sharers also see the context",
    "receiver_as_sharer": "C2C by another fuser, whose sharer is the receiver itself",
    "fusion_off": "C2C with fusion switched off: the receiver, with the adapter if the fuser brings one",
    "closed_gates": "C2C with every gate closed: equals the receiver up to rounding",
    "mismatched": "C2C, but the sharers prefill another question, or another one's context",
    "shuffled": "C2C, but the sharers' positions are assigned in random order",
    "zero": "C2C, but the sharers' states are zero",
    "noise": "C2C, but the sharers' states are noise of the same norms",
    "first_quarter": "C2C, but only the first quarter of the positions is fused",
    "first_half": "C2C, but only the first half of the positions is fused",
    "last_quarter": "C2C, but only the last quarter of the positions is fused",
    "last_half": "C2C, but only the last half of the positions is fused",
    "most_changed_quarter": "C2C, but only the quarter of the positions is fused whose values change most",
    "most_changed_half": "C2C, but only the half of the positions is fused whose values change most",
    "int8_states": "C2C, but the sharers' states are rounded to 8 bits",
    "int4_states": "C2C, but the sharers' states are rounded to 4 bits",
}
#: Those that do not depend on the fuser; a method of one of several sharers has its number behind its name.
FUSER_FREE_METHODS = ("receiver", "receiver_with_context", "sharer", "text_to_text")
#: Computed from other methods' records, see [`~baselines.route_queries`].
DERIVED_METHODS = ("routing",)


def build_methods(
    names: Sequence[str],
    model: C2CForCausalLM,
    processor: C2CProcessor,
    adapter: str | None = None,
    self_fuser: ModelWithProcessor | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    background_tokens: int = 256,
    fusion_fuser: ModelWithProcessor | None = None,
) -> dict[str, Method]:
    """Build methods; with several sharers `sharer` becomes `sharer_0`, `sharer_1`, ...

    Args:
        names: Of `METHODS`, without `DERIVED_METHODS`.
        model: The C2C model.
        processor: Its processor.
        adapter: Folder or Hub id of a LoRA adapter for the receiver, or folder of a fuser that brings one, for
            `receiver_with_adapter`. `None`: the one that the receiver has.
        self_fuser: A fuser whose sharer is its receiver, for `receiver_as_sharer`.
        chat_template_kwargs: Arguments of every chat template.
        background_tokens: Maximum length of the background of `text_to_text`.
        fusion_fuser: A fuser with `mode="fusion"`, for `same_text_fusion`.

    Raises:
        ValueError: A name is unknown, or what its method needs is missing.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"`methods` must be among {list(METHODS)}, but got {unknown}.")
    if "closed_gates" in names and model.config.mode == "memory":
        raise ValueError("`methods`: 'closed_gates' needs gates, which a memory fuser does not have.")
    receiver = ModelAnswerer(model.receiver, processor.tokenizer)
    sharers = [
        ModelAnswerer(sharer, tokenizer, with_context=True)
        for sharer, tokenizer in zip(model.sharers, processor.sharer_tokenizers, strict=True)
    ]
    controls = {**CONTROLS, **PAYLOAD_ABLATIONS}
    methods: dict[str, Method] = {}
    prefills = SharerPrefills()
    for name in names:
        if name in controls:
            # A control may change the states in place.
            shared = None if controls[name].changes_states else prefills
            methods[name] = C2CAnswerer(model, processor, controls[name], shared)
        elif name == "receiver":
            methods[name] = receiver
        elif name == "receiver_with_context":
            methods[name] = ModelAnswerer(model.receiver, processor.tokenizer, with_context=True)
        elif name == "receiver_with_adapter":
            if adapter is None and not has_adapter(model.receiver):
                raise ValueError(
                    f"`methods`: {name!r} needs `adapter`, the folder or Hub id of a LoRA adapter for the receiver."
                )
            adapted = model.receiver if adapter is None else _adapted(model.receiver, adapter)
            methods[name] = ModelAnswerer(adapted, processor.tokenizer, with_adapter=True)
        elif name == "sharer":
            one = len(sharers) == 1
            methods.update({name if one else f"{name}_{i}": sharer for i, sharer in enumerate(sharers)})
        elif name == "text_to_text":
            methods[name] = TextToText(sharers[0], receiver, background_tokens)
        elif name == "same_text_fusion":
            if fusion_fuser is None:
                raise ValueError(f"`methods`: {name!r} needs `fusion_fuser`, a fuser with `mode='fusion'`.")
            methods[name] = C2CAnswerer(*fusion_fuser)
        elif name == "receiver_as_sharer":
            if self_fuser is None:
                raise ValueError(f"`methods`: {name!r} needs `self_fuser`, a fuser whose sharer is the receiver.")
            methods[name] = C2CAnswerer(*self_fuser)
    for method in (receiver, *sharers, *methods.values()):
        if isinstance(method, Answerer):
            method.chat_template_kwargs = chat_template_kwargs or {}
    return methods


def _adapted(receiver: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Return a second receiver with an adapter from a folder or the Hub, or from a fuser's folder that has one."""
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    # A copy, since an adapter replaces layers; without the adapter that the receiver may have.
    weights = {name.replace(".base_layer.", "."): value for name, value in receiver.state_dict().items()}
    copied = AutoModelForCausalLM.from_config(receiver.config, dtype=receiver.dtype)
    copied.load_state_dict({name: weights[name] for name in copied.state_dict()})
    own_folder = Path(adapter) / ADAPTER_FOLDER
    source = str(own_folder if own_folder.is_dir() else adapter)
    add_adapter(copied, PeftConfig.from_pretrained(source))
    set_peft_model_state_dict(copied, load_peft_weights(source, device="cpu"), adapter_name="default")
    return copied.to(receiver.device).requires_grad_(False).eval()
