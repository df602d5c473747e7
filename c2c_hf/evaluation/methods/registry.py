"""Methods by name, and how each is built from a C2C model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoModelForCausalLM, PreTrainedModel

from ...checkpoints.receiver_adapter import ADAPTER_FOLDER, add_adapter, has_adapter, set_adapter_weights
from ...modeling_c2c import C2CForCausalLM
from ...processing_c2c import C2CProcessor
from .answerer import MAX_EXAMPLES, Answerer, Method, ModelAnswerer
from .baselines import TextToText
from .c2c_answerer import C2CAnswerer, SharerPrefills
from .controls import CONTROLS, Control, LayerSubset
from .oracle_enrichment import build_oracle
from .own_states import OwnStates
from .payload_ablations import PAYLOAD_ABLATIONS, PositionSubset

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
    "swapped_pair": "C2C by another fuser, whose receiver is the first sharer, and whose sharer is the receiver",
    "two_sharers": "C2C by another fuser with several sharers",
    "few_shot=<k>": "the receiver without fusion, k other questions with their answers in its prompt",
    "oracle_enrichment=<k>": "the receiver, the question's states taken from behind k other questions and answers",
    "closed_gates": "C2C with every gate closed: equals the receiver up to rounding",
    "all_gates_open": "C2C with every gate open, also those that training has closed",
    "fuse_only": "C2C without gates and dynamic weights: the projection is added as it is",
    "project_only": "C2C without gates, dynamic weights and residual: the projection replaces the receiver's states",
    "single_layer=<l>": "C2C, but only receiver layer l is fused",
    "layers=<list>": "C2C, but only these receiver layers are fused, such as layers=0,4-7",
    "best_layers=<k>": "C2C, but only the k receiver layers are fused that alone do best on other items",
    "own_states": "memory mode, but slots hold the receiver's own states of the context: equals prefilling it",
    "own_states=<list>": "the same in these receiver layers only, such as own_states=0-9",
    "own_keys": "memory mode, but the keys of slots are the receiver's own",
    "own_values": "memory mode, but the values of slots are the receiver's own",
    "mismatched": "C2C, but the sharers prefill another question, or another one's context",
    "shuffled": "C2C, but the sharers' positions are assigned in random order",
    "zero": "C2C, but the sharers' states are zero",
    "noise": "C2C, but the sharers' states are noise of the same norms",
    "first_quarter": "C2C, but only the first quarter of the positions is fused",
    "first_half": "C2C, but only the first half of the positions is fused",
    "last_quarter": "C2C, but only the last quarter of the positions is fused",
    "last_half": "C2C, but only the last half of the positions is fused",
    "first=<share>": "C2C, but only this share of the positions is fused, from the front, such as first=0.1",
    "last=<share>": "the same from the back",
    "most_changed=<share>": "the same of those whose values change most",
    "most_changed_quarter": "C2C, but only the quarter of the positions is fused whose values change most",
    "most_changed_half": "C2C, but only the half of the positions is fused whose values change most",
    "int8_states": "C2C, but the sharers' states are rounded to 8 bits",
    "int4_states": "C2C, but the sharers' states are rounded to 4 bits",
}
#: Of memory mode.
OWN_STATES: dict[str, Control] = {
    "own_states": OwnStates(),
    "own_keys": OwnStates(values=False),
    "own_values": OwnStates(keys=False),
}
#: Controls with a parameter, which stands behind the name and `=`.
PARAMETERIZED: dict[str, Callable[[str], Control]] = {
    "single_layer": lambda value: LayerSubset([int(value)]),
    "layers": lambda value: LayerSubset(parse_layers(value)),
    "own_states": lambda value: OwnStates(layers=parse_layers(value)),
    "first": lambda value: PositionSubset("first", float(value)),
    "last": lambda value: PositionSubset("last", float(value)),
    "most_changed": lambda value: PositionSubset("most_changed", float(value)),
}
#: Those that do not depend on the fuser; a method of one of several sharers has its number behind its name.
FUSER_FREE_METHODS = ("receiver", "receiver_with_context", "sharer", "text_to_text")
#: Computed from other methods' records, see [`~baselines.route_queries`].
DERIVED_METHODS = ("routing",)
#: Built after other methods have answered, see [`~best_layers.answer_best_layers`].
BEST_LAYERS = "best_layers"
#: Those that show other items of the task to the receiver.
_WITH_EXAMPLES = ("few_shot", "oracle_enrichment")


def parse_layers(text: str) -> list[int]:
    """Parse layer indices and ranges such as `0,4-7`.

    Raises:
        ValueError: It is something else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    return layers


def split_name(name: str) -> tuple[str, str]:
    """Return a method's name without its parameter, and the parameter; empty where it has none."""
    base, _, value = name.partition("=")
    return base, value


def describe_method(name: str) -> str:
    """Return the description of a method, whatever its parameter; of one of several sharers that of `sharer`."""
    base, value = split_name(name)
    with_parameter = (text for key, text in METHODS.items() if value and key.startswith(f"{base}=<"))
    return METHODS.get(name) or next(with_parameter, METHODS["sharer"])


def find_control(name: str) -> Control | None:
    """Return the control of a method; `None` for one without.

    Raises:
        ValueError: The parameter in the name has no meaning.
    """
    fixed = {**CONTROLS, **PAYLOAD_ABLATIONS, **OWN_STATES}
    base, value = split_name(name)
    if name in fixed or base not in PARAMETERIZED:
        return fixed.get(name)
    try:
        return PARAMETERIZED[base](value)
    except ValueError as error:
        raise ValueError(f"`methods`: {name!r} has no parameter of the right kind ({error}).") from error


def number_of(name: str, largest: int | None = None) -> int:
    """Return the number behind a method's name.

    Raises:
        ValueError: It is no number, or out of range.
    """
    value = split_name(name)[1]
    if not value.isdecimal() or not 0 < int(value) <= (largest or int(value)):
        limit = "" if largest is None else f" up to {largest}"
        raise ValueError(f"`methods`: {name!r} must end with a number above 0{limit}.")
    return int(value)


def uses_examples(name: str) -> bool:
    """Say whether a method shows other items of the task to the receiver."""
    return split_name(name)[0] in _WITH_EXAMPLES


def build_methods(
    names: Sequence[str],
    model: C2CForCausalLM,
    processor: C2CProcessor,
    adapter: str | None = None,
    self_fuser: ModelWithProcessor | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    background_tokens: int = 256,
    fusion_fuser: ModelWithProcessor | None = None,
    swapped_fuser: ModelWithProcessor | None = None,
    two_sharer_fuser: ModelWithProcessor | None = None,
) -> dict[str, Method]:
    """Build methods; with several sharers `sharer` becomes `sharer_0`, `sharer_1`, ...

    Args:
        names: Of `METHODS`, without `DERIVED_METHODS` and `best_layers`; parameters in place of `<...>`.
        model: The C2C model.
        processor: Its processor.
        adapter: Folder or Hub id of a LoRA adapter for the receiver, or folder of a fuser that brings one, for
            `receiver_with_adapter`. `None`: the one that the receiver has.
        self_fuser: A fuser whose sharer is its receiver, for `receiver_as_sharer`.
        chat_template_kwargs: Arguments of every chat template.
        background_tokens: Maximum length of the background of `text_to_text`.
        fusion_fuser: A fuser with `mode="fusion"`, for `same_text_fusion`.
        swapped_fuser: A fuser whose receiver is the first sharer, for `swapped_pair`.
        two_sharer_fuser: A fuser with several sharers, for `two_sharers`.

    Raises:
        ValueError: A name is unknown, or what its method needs is missing.
    """
    check_names(names)
    other_fusers = {
        "same_text_fusion": ("fusion_fuser", "with `mode='fusion'`", fusion_fuser),
        "receiver_as_sharer": ("self_fuser", "whose sharer is the receiver", self_fuser),
        "swapped_pair": ("swapped_fuser", "whose receiver is the first sharer", swapped_fuser),
        "two_sharers": ("two_sharer_fuser", "with several sharers", two_sharer_fuser),
    }
    receiver = ModelAnswerer(model.receiver, processor.tokenizer)
    sharers = [
        ModelAnswerer(sharer, tokenizer, with_context=True)
        for sharer, tokenizer in zip(model.sharers, processor.sharer_tokenizers, strict=True)
    ]
    methods: dict[str, Method] = {}
    prefills = SharerPrefills()
    for name in names:
        if (control := find_control(name)) is not None:
            control.check(name, model)
            # A control may change the states in place.
            shared = None if control.changes_states else prefills
            methods[name] = C2CAnswerer(model, processor, control, shared)
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
        elif split_name(name)[0] == "few_shot":
            count = number_of(name, MAX_EXAMPLES)
            methods[name] = ModelAnswerer(model.receiver, processor.tokenizer, num_examples=count)
        elif split_name(name)[0] == "oracle_enrichment":
            methods[name] = build_oracle(model.receiver, processor.tokenizer, number_of(name, MAX_EXAMPLES))
        elif name in other_fusers:
            argument, kind, fuser = other_fusers[name]
            if fuser is None:
                raise ValueError(f"`methods`: {name!r} needs `{argument}`, a fuser {kind}.")
            _check_other_fuser(name, model, fuser[0])
            methods[name] = C2CAnswerer(*fuser)
    for method in (receiver, *sharers, *methods.values()):
        if isinstance(method, Answerer):
            method.chat_template_kwargs = chat_template_kwargs or {}
    return methods


def check_names(names: Sequence[str]) -> None:
    """Refuse names of methods that are not there.

    Raises:
        ValueError: Naming them.
    """
    keys = {key.partition("<")[0] for key in METHODS}
    if unknown := [name for name in names if name.partition("=")[0] + "=" * ("=" in name) not in keys]:
        raise ValueError(f"`methods` must be among {list(METHODS)}, but got {unknown}.")


def _check_other_fuser(name: str, model: C2CForCausalLM, other: C2CForCausalLM) -> None:
    """Compare another fuser's base models with those of the model, where both are recorded."""
    if name == "two_sharers" and other.config.num_sharers < 2:
        raise ValueError(f"`methods`: {name!r} needs a fuser with several sharers, but it has one.")
    expected = model.config.sharers[0] if name == "swapped_pair" else None
    found = other.config.receiver_fingerprint
    if expected is not None and None not in (expected.fingerprint, found) and expected.fingerprint != found:
        raise ValueError(f"`methods`: the receiver of the fuser for {name!r} is not the first sharer of this one.")


def _adapted(receiver: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Return a second receiver with an adapter from a folder or the Hub, or from a fuser's folder that has one."""
    from peft import PeftConfig, load_peft_weights

    # A copy, since an adapter replaces layers; without the adapter that the receiver may have.
    weights = {name.replace(".base_layer.", "."): value for name, value in receiver.state_dict().items()}
    copied = AutoModelForCausalLM.from_config(receiver.config, dtype=receiver.dtype)
    copied.load_state_dict({name: weights[name] for name in copied.state_dict()})
    own_folder = Path(adapter) / ADAPTER_FOLDER
    source = str(own_folder if own_folder.is_dir() else adapter)
    add_adapter(copied, PeftConfig.from_pretrained(source))
    set_adapter_weights(copied, load_peft_weights(source, device="cpu"), f"of {source!r}")
    return copied.to(receiver.device).requires_grad_(False).eval()
