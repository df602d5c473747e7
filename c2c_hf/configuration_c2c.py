"""`C2CConfig` and `SharerConfig`: the pair, the fuser's sizes, the layer mapping and the token alignment."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from transformers import AutoConfig, PreTrainedConfig

LAYER_ALIGNMENTS = ("terminal", "depth_normalized", "learned")
TOKEN_ALIGNMENTS = ("identity", "first", "longest", "span")
MODES = ("fusion", "memory")
FUSION_MODES = ("parallel", "sequential")
MEMORY_GRIDS = ("receiver", "sharer")
FUSER_TYPES = ("c2c", "c2c_complex", "c2c_shared")
FUSER_INITIALIZATIONS = ("closed_gates", "zero_output")

Value = TypeVar("Value")

#: (num_key_value_heads, key head_dim, value head_dim) of one cached layer.
LayerShape = tuple[int, int, int]


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise `ValueError` if `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, but got {value!r}.")


def one_per_sharer(name: str, value: Value | Sequence[Value], num_sharers: int) -> list[Value]:
    """Turn a one-or-many argument into a list with one entry per sharer.

    Args:
        name: Of the argument, for the error.
        value: One value for all sharers, or a list or tuple with one per sharer.
        num_sharers: Number of sharers.

    Raises:
        ValueError: The list has another length.
    """
    if not isinstance(value, list | tuple):
        return [cast(Value, value)] * num_sharers
    if len(value) != num_sharers:
        raise ValueError(f"`{name}` must be one value, or one per sharer ({num_sharers}), but got {value!r}.")
    return list(value)


def layer_mapping(num_receiver_layers: int, num_sharer_layers: int, layer_alignment: str = "terminal") -> list[int]:
    """Map every receiver layer to a sharer layer.

    Args:
        num_receiver_layers: Number of layers in the receiver's cache.
        num_sharer_layers: Number of layers in the sharer's cache.
        layer_alignment: `"terminal"` pairs the last layers and walks down, surplus receiver layers take sharer
            layer 0 (arXiv 2510.03215); `"depth_normalized"` pairs layers of nearest relative depth.

    Returns:
        One sharer layer index per receiver layer.
    """
    if layer_alignment == "terminal":
        return [max(0, num_sharer_layers - num_receiver_layers + i) for i in range(num_receiver_layers)]
    if num_receiver_layers == 1:
        return [num_sharer_layers - 1]
    scale = (num_sharer_layers - 1) / (num_receiver_layers - 1)
    # Half-way depths go up, so that the map does not depend on Python's rounding of halves to even.
    return [int(i * scale + 0.5) for i in range(num_receiver_layers)]


def several_source_layers(
    field: str, chosen: list[list[int]] | None, num_receiver_layers: int, num_sharer_layers: int, count: int
) -> list[list[int]]:
    """Return the sharer layers of every receiver layer where each takes several.

    Args:
        field: Name of the field that holds the chosen ones, for the error.
        chosen: Those chosen by a fit. `None`: `count` neighbours around the layer's relative depth.
        num_receiver_layers: Number of layers in the receiver's cache.
        num_sharer_layers: Number of layers in the sharer's cache.
        count: Number of neighbours, at most all layers.

    Raises:
        ValueError: `chosen` names layers that the sharer does not have, or does not hold one entry per receiver layer.
    """
    if chosen is None:
        count = min(count, num_sharer_layers)
        centers = layer_mapping(num_receiver_layers, num_sharer_layers, "depth_normalized")
        starts = [min(max(0, center - count // 2), num_sharer_layers - count) for center in centers]
        return [list(range(start, start + count)) for start in starts]
    if len(chosen) != num_receiver_layers or any(
        not own or not all(0 <= layer < num_sharer_layers for layer in own) for own in chosen
    ):
        raise ValueError(
            f"`{field}` of a sharer must hold layers below {num_sharer_layers} for each of the {num_receiver_layers} "
            f"receiver layers, but got {chosen!r:.80}."
        )
    return [list(own) for own in chosen]


@dataclasses.dataclass
class SharerConfig:
    """Everything about one sharer: the model, its fuser's sizes and its token alignment.

    Args:
        name_or_path: Hub id or folder of the model.
        revision: Commit, tag or branch. `None` for a local folder.
        gguf_file: The file of a model in GGUF format. `None`: another format.
        has_adapter: Whether the model came with a PEFT adapter, which is saved beside the fuser.
        config: Nested configuration of the model, or its dictionary.
        layer_shapes: Per cached layer `[num_key_value_heads, key head_dim, value head_dim]`, measured on the model
            when the fuser is built and compared when it is loaded again.
        fingerprint: Short hash of the weights, compared on loading. `None`: not compared.
        tokenizer_hash: Short hash of the vocabulary, compared where weights cannot be. `None`: not compared.
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`: how a receiver token is aligned with a token
            of this sharer.
        bos_token_id: Token in front of the sharer's text under `"first"` and `"longest"`, where the receiver's tokens
            alone would give it none. `None`: no such token.
        fuser_hidden_size: Width inside the fuser. Compact fusers go down to 64.
        fuser_intermediate_size: Width inside the fuser's feed-forward blocks.
        num_fuser_layers: Depth of the fuser, input projection included; at least 2.
        fuser_dropout: Dropout in the feed-forward blocks while training.
        fusion_source_layers: With `layer_alignment="learned"`, per receiver layer the layers of this sharer that it is
            fused with, as [`fit_layer_mapping`] chooses them. `None`: neighbours around its relative depth.
        memory_source_layers: In memory mode, per receiver layer the layers of this sharer from which its slots are
            computed, as [`~fitting.ridge.fit_ridge`] chooses them. `None`: neighbours around its relative depth.
        rotations: How the keys of each layer turn with their position, recorded for memory fusers, so that the cache
            of a sharer that runs elsewhere can be used; see [`~inference.rotary.describe_rotations`]. `None`: measured
            on the model.

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    name_or_path: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    has_adapter: bool = False
    config: PreTrainedConfig | dict[str, Any] | None = None
    layer_shapes: list[list[int]] | None = None
    fingerprint: str | None = None
    tokenizer_hash: str | None = None
    token_alignment: str = "span"
    bos_token_id: int | None = None
    fuser_hidden_size: int = 1024
    fuser_intermediate_size: int = 1024
    num_fuser_layers: int = 3
    fuser_dropout: float = 0.1
    fusion_source_layers: list[list[int]] | None = None
    memory_source_layers: list[list[int]] | None = None
    rotations: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.config = _as_config(self.config)
        self.check()

    def check(self) -> None:
        """Check the values of all fields.

        Raises:
            ValueError: For an unknown value.
        """
        check_choice("token_alignment", self.token_alignment, TOKEN_ALIGNMENTS)
        for field in ("gguf_file", "fingerprint"):
            _check_text(field, getattr(self, field))
        if not isinstance(self.has_adapter, bool):
            raise ValueError(f"`has_adapter` must be True or False, but got {self.has_adapter!r:.60}.")
        _check_layer_shapes("layer_shapes", self.layer_shapes)
        for field, smallest in (("fuser_hidden_size", 1), ("fuser_intermediate_size", 1), ("num_fuser_layers", 2)):
            _check_integer(field, getattr(self, field), smallest)
        if not isinstance(self.fuser_dropout, float | int) or not 0.0 <= self.fuser_dropout < 1.0:
            raise ValueError(f"`fuser_dropout` must be in [0, 1), but got {self.fuser_dropout!r}.")
        for field in ("fusion_source_layers", "memory_source_layers"):
            sources = getattr(self, field)
            if sources is not None and not (
                isinstance(sources, list)
                and all(isinstance(own, list) and all(type(layer) is int for layer in own) for own in sources)
            ):
                raise ValueError(f"`{field}` must be lists of layer indices, but got {sources!r:.80}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, the nested configuration included."""
        output = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        output["config"] = _as_dict(self.config)
        return output


#: Fields of [`SharerConfig`] that a user chooses; the others are measured on the models.
SHARER_FIELDS = (
    *("token_alignment", "bos_token_id", "fuser_hidden_size", "fuser_intermediate_size", "num_fuser_layers"),
    "fuser_dropout",
)
_FUSER_SIZES = ("fuser_hidden_size", "fuser_intermediate_size", "num_fuser_layers", "fuser_dropout")
#: Fields without meaning in memory mode, with their defaults.
_FUSION_ONLY = {"fuser_type": "c2c", "joint_keys_values": False, "unrotate_keys": False}
_MEASURED_FIELDS = (
    *(
        "receiver_name_or_path",
        "receiver_revision",
        "receiver_gguf_file",
        "receiver_config",
        "receiver_fingerprint",
        "sharers",
    ),
    *("receiver_layer_shapes", "receiver_embedding_size", "receiver_tokenizer_hash"),
)


class C2CConfig(PreTrainedConfig):
    """Configuration of a [`C2CForCausalLM`].

    Fields of the fuser carry a `fuser_` prefix because transformers reads `hidden_size` and its like off a
    configuration as the language model's; [`C2CConfig.get_text_config`] returns the receiver's.

    Args:
        receiver_name_or_path: Hub id or folder of the model that answers.
        receiver_revision: Commit, tag or branch of the receiver. `None` for a local folder.
        receiver_gguf_file: The file of a receiver in GGUF format. `None`: another format.
        receiver_config: Nested configuration of the receiver, or its dictionary.
        receiver_layer_shapes: Per cached receiver layer `[num_key_value_heads, key head_dim, value head_dim]`,
            measured on the model when the fuser is built and compared when it is loaded again.
        receiver_embedding_size: Width of the receiver's token embeddings, measured likewise.
        receiver_fingerprint: Short hash of the receiver's weights, compared on loading. `None`: not compared.
        receiver_tokenizer_hash: Short hash of the receiver's vocabulary, compared where weights cannot be.
        sharers: One [`SharerConfig`] per sharer, or their dictionaries, in order.
        mode: How the sharers reach the receiver. `"fusion"`: their states are fused with the receiver's at the aligned
            positions of the text that both prefill. `"memory"`: the states of a sharer-only context take positions of
            their own in the receiver's cache; the shared text is not fused then.
        fuser_type: The fuser of fusion mode. `"c2c"`: the projector of arXiv 2510.03215. `"c2c_complex"`: the same
            behind a three-layer network of its own that brings the sharer's states to the receiver's width (C2C-C,
            section A.1.3 there). `"c2c_shared"`: a network per sharer into a latent space, one projector out of it for
            all sharers, and gates of their own (table 14 there).
        fuser_initialization: How a new fuser changes nothing. `"closed_gates"`: all gates at logit 0, which is closed
            at inference, in front of random output layers (arXiv 2510.03215); training starts by adding noise.
            `"zero_output"`: gates open at logit 1 in front of output layers that are zero, as LoRA starts.
        initial_gate_temperature: Temperature of the gates when training starts.
        final_gate_temperature: Temperature of the gates when training ends; between them it decays exponentially.
        layer_alignment: Which sharer layers a receiver layer is fused with. `"terminal"`: last with last, then
            downwards, surplus receiver layers with sharer layer 0 (arXiv 2510.03215). `"depth_normalized"`: the layer
            at the nearest relative depth. `"learned"`: those that [`fit_layer_mapping`] has chosen, else neighbours
            around its relative depth.
        fusion_source_layers: With `layer_alignment="learned"`, the number of sharer layers that each receiver layer
            takes.
        joint_keys_values: In fusion mode, the projectors of a layer's keys and of its values both get the sharer's
            keys and values; else keys get keys and values get values.
        shared_hidden_size: Width of the latent space of `"c2c_shared"`. Equal in all models that share it.
        shared_num_layers: Number of its layers, each filled from the sharer layer at the nearest relative depth;
            `layer_alignment` maps the receiver's layers to them. Equal likewise.
        unrotate_keys: In fusion mode, the fuser gets keys free of rotary position, and its changes of the receiver's
            keys are rotated to their positions. It then need not learn positions, and the sharer's may differ.
        fusion_mode: With several sharers, `"parallel"` sums the changes that every fuser computes on the receiver's
            own states, `"sequential"` hands each fuser the output of the one before it.
        fuse_response: Keep fusing for answer tokens. Costs one more forward pass of the receiver and one of each
            sharer per token, and needs a token-by-token alignment (all but `"span"`).
        memory_grid: Which tokens of a sharer-only context have slots. `"receiver"`: the receiver's own, in front of
            the prompt as if it prefilled the context; each is filled from the first sharer token that ends at or after
            it. `"sharer"`: the sharer's, behind the prompt's first `memory_sink_tokens`.
        memory_token_embeddings: On the receiver's grid, number of the receiver's token embeddings that the fuser gets
            for each slot beside the sharer's states: that of the slot's own token, of the token before it, and so on.
            Receivers find what to copy by the token before it, which the sharer's states do not tell where one token
            of the sharer spans both. 0: none.
        memory_sink_tokens: Number of the prompt's first tokens, its attention sink, that the receiver always computes.
        memory_source_layers: Number of sharer layers from which each receiver layer's slots are computed.
        memory_rank: Width of the bottleneck of each layer's map. `None`: full rank.
        memory_hidden_size: Width of the residual network beside each layer's map. 0: none.

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    model_type = "c2c"

    receiver_name_or_path: str | None = None
    receiver_revision: str | None = None
    receiver_gguf_file: str | None = None
    receiver_config: PreTrainedConfig | dict[str, Any] | None = None
    receiver_layer_shapes: list[list[int]] | None = None
    receiver_embedding_size: int | None = None
    receiver_fingerprint: str | None = None
    receiver_tokenizer_hash: str | None = None
    sharers: list[SharerConfig] = dataclasses.field(default_factory=list)
    mode: str = "fusion"
    fuser_type: str = "c2c"
    fuser_initialization: str = "closed_gates"
    initial_gate_temperature: float = 1.0
    final_gate_temperature: float = 0.001
    layer_alignment: str = "terminal"
    fusion_source_layers: int = 1
    joint_keys_values: bool = False
    unrotate_keys: bool = False
    shared_hidden_size: int = 512
    shared_num_layers: int = 16
    fusion_mode: str = "parallel"
    fuse_response: bool = False
    memory_grid: str = "receiver"
    memory_token_embeddings: int = 2
    memory_sink_tokens: int = 1
    memory_source_layers: int = 3
    memory_rank: int | None = None
    memory_hidden_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.receiver_config = _as_config(self.receiver_config)
        if not isinstance(self.sharers, list | tuple | None):
            raise ValueError(f"`sharers` must be a list, but got {self.sharers!r:.80}.")
        self.sharers = [_as_sharer_config(sharer) for sharer in self.sharers or []]
        dtype = kwargs.get("dtype", getattr(self, "dtype", None))
        if dtype is not None and not isinstance(
            dtype if isinstance(dtype, torch.dtype) else _torch_dtype(dtype), torch.dtype
        ):
            raise ValueError(f"`dtype` must be the name of a torch dtype, but got {dtype!r:.80}.")
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Check the values of all fields, those of the sharers included.

        Raises:
            ValueError: For an unknown value.
        """
        for field, allowed in (
            ("fuser_type", FUSER_TYPES),
            ("fuser_initialization", FUSER_INITIALIZATIONS),
            ("layer_alignment", LAYER_ALIGNMENTS),
            ("mode", MODES),
            ("fusion_mode", FUSION_MODES),
            ("memory_grid", MEMORY_GRIDS),
        ):
            check_choice(field, getattr(self, field), allowed)
        for field in ("receiver_gguf_file", "receiver_fingerprint"):
            _check_text(field, getattr(self, field))
        _check_layer_shapes("receiver_layer_shapes", self.receiver_layer_shapes)
        alignments = []
        for sharer in self.sharers:
            sharer.check()
            alignments.append(sharer.token_alignment)
        if self.fuse_response and "span" in alignments:
            raise ValueError(
                "`fuse_response=True` needs a token-by-token `token_alignment` ('identity', 'first' or 'longest'), "
                f"but got {alignments}."
            )
        if self.mode == "memory" and set(alignments) - {"span"}:
            raise ValueError(
                f"`mode='memory'` needs `token_alignment='span'`, but got {alignments}: the sharer prefills a context "
                "that the receiver does not."
            )
        if self.mode == "memory":
            fields = [name for name, default in _FUSION_ONLY.items() if getattr(self, name) != default]
            if fields:
                raise ValueError(f"`mode='memory'` has a fuser of its own: {fields} need `mode='fusion'`.")
        for field, smallest in (
            *(("fusion_source_layers", 1), ("memory_source_layers", 1), ("memory_token_embeddings", 0)),
            *(("memory_sink_tokens", 0), ("memory_hidden_size", 0)),
            *(("shared_hidden_size", 1), ("shared_num_layers", 1)),
        ):
            _check_integer(field, getattr(self, field), smallest)
        if self.fusion_source_layers > 1 and self.layer_alignment != "learned":
            raise ValueError(
                f"`fusion_source_layers` must be 1 without `layer_alignment='learned'`, but got "
                f"{self.fusion_source_layers} with {self.layer_alignment!r}."
            )
        if self.fuser_type == "c2c_shared":
            if self.layer_alignment == "learned":
                raise ValueError("`layer_alignment='learned'` does not go with `fuser_type='c2c_shared'`.")
            sizes = {tuple(getattr(sharer, name) for name in _FUSER_SIZES) for sharer in self.sharers}
            if len(sizes) > 1:
                raise ValueError(
                    f"`fuser_type='c2c_shared'` has one projector for all sharers: {list(_FUSER_SIZES)} must be "
                    f"equal, but got {sorted(sizes)}."
                )
        for field in ("joint_keys_values", "unrotate_keys"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"`{field}` must be True or False, but got {getattr(self, field)!r}.")
        for field in ("memory_rank", "receiver_embedding_size"):
            if getattr(self, field) is not None:
                _check_integer(field, getattr(self, field), 1)
        for field in ("initial_gate_temperature", "final_gate_temperature"):
            value = getattr(self, field)
            if not isinstance(value, float | int) or not math.isfinite(value):
                raise ValueError(f"`{field}` must be a number, but got {value!r}.")
        if not 0.0 < self.final_gate_temperature <= self.initial_gate_temperature:
            raise ValueError(
                "Gate temperatures must satisfy 0 < `final_gate_temperature` <= `initial_gate_temperature`, but got "
                f"{self.final_gate_temperature!r} and {self.initial_gate_temperature!r}."
            )

    def override(self, fields: dict[str, Any]) -> None:
        """Set fields of this configuration and of its sharers, and check them.

        Args:
            fields: Of [`C2CConfig`], or those of `SHARER_FIELDS`, with one value for all sharers or one per sharer.

        Raises:
            ValueError: For an unknown field or value.
        """
        self.check_names(fields)
        for name, value in fields.items():
            if name in SHARER_FIELDS:
                for sharer, own in zip(self.sharers, one_per_sharer(name, value, len(self.sharers)), strict=True):
                    setattr(sharer, name, own)
            else:
                setattr(self, name, value)
        self.check()

    @classmethod
    def check_names(cls, names: Iterable[str], by_user: bool = False) -> None:
        """Refuse names that are no fields, which transformers would keep as attributes without effect.

        Args:
            names: Of the fields, those of `SHARER_FIELDS` included.
            by_user: Refuse those that are measured on the base models, too.

        Raises:
            ValueError: Naming them.
        """
        names = list(names)
        known = {*SHARER_FIELDS, *(field.name for field in dataclasses.fields(cls))}
        if unknown := [name for name in names if name not in known]:
            advice = "see its documentation for those there are"
            if {"quantization_config", "gguf_file", "load_in_4bit", "load_in_8bit"} & set(unknown):
                advice = "arguments of a base model go into `receiver_kwargs` or `sharer_kwargs`"
            raise ValueError(f"These are no fields of `C2CConfig`: {unknown}; {advice}.")
        if by_user and (measured := [name for name in names if name in _MEASURED_FIELDS]):
            raise ValueError(f"These fields are measured on the models and cannot be given: {measured}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a dictionary; models in `sharers=`, which the Auto classes hand over, are left to the model."""
        if not kwargs.get("return_unused_kwargs") or "sharers" not in kwargs:
            return super().from_dict(config_dict, **kwargs)
        sharers = kwargs.pop("sharers")
        config, unused = super().from_dict(config_dict, **kwargs)
        return config, {**unused, "sharers": sharers}

    @property
    def needs_rotations(self) -> bool:
        """Whether keys are compared free of rotary position."""
        return self.mode == "memory" or self.unrotate_keys

    @property
    def num_sharers(self) -> int:
        """Number of sharers."""
        return len(self.sharers)

    @property
    def token_alignments(self) -> list[str]:
        """The token alignment of each sharer."""
        return [sharer.token_alignment for sharer in self.sharers]

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Copy no code into saved folders, since this class is installed; refuse lm-evaluation-harness's type `hf`.

        transformers calls this where it loads the class by `trust_remote_code=True`, not after `import c2c_hf`.

        Raises:
            ValueError: The harness is loaded, whose type `hf` would score continuations as the receiver does.
        """
        # The model's `forward` can only warn: it gets token ids alone, as from a user who wants the last logits.
        if "lm_eval" in sys.modules:
            raise ValueError(
                "lm-evaluation-harness cannot score a fuser by its model type hf, which does not say where a prompt "
                "ends, so that the log-likelihoods would be the receiver's; use `c2c lm-eval --model c2c`. To load "
                "the fuser for something else, `import c2c_hf` first."
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the receiver's text configuration, which is what generation and caches need to know."""
        if not isinstance(self.receiver_config, PreTrainedConfig):
            return self
        return self.receiver_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, nested ones included."""
        receiver_config, sharers = self.receiver_config, self.sharers
        # The base class copies every attribute but turns only direct configurations into dictionaries.
        output = super().to_dict()
        output["receiver_config"] = _as_dict(receiver_config)
        output["sharers"] = [sharer.to_dict() for sharer in sharers]
        return output


def _as_sharer_config(sharer: SharerConfig | dict[str, Any]) -> SharerConfig:
    if isinstance(sharer, SharerConfig):
        return sharer
    if not isinstance(sharer, dict):
        raise ValueError(f"`sharers` must hold `SharerConfig` or dictionaries, but got {sharer!r}.")
    known = {field.name for field in dataclasses.fields(SharerConfig)}
    if unknown := sorted(set(sharer) - known):
        raise ValueError(
            f"These are no fields of `SharerConfig`: {unknown}; see its documentation for those there are."
        )
    return SharerConfig(**sharer)


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise ValueError(
            "`receiver_config` and the `config` of a sharer must be a configuration or a dictionary, but got "
            f"{config!r}."
        )
    fields = dict(config)
    if not isinstance(fields.get("model_type"), str):
        raise ValueError("A nested base model configuration needs its `model_type`, but the dictionary has none.")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _as_dict(config: PreTrainedConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    # The folder that a base model was loaded from is recorded in `name_or_path` alone.
    return {
        key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }


def _torch_dtype(name: object) -> object:
    return getattr(torch, name, None) if isinstance(name, str) else None


def _check_layer_shapes(field: str, shapes: object) -> None:
    """Raise `ValueError` if recorded layer shapes are neither `None` nor three sizes for every layer."""
    if shapes is None:
        return
    sizes = shapes if isinstance(shapes, list | tuple) else []
    if not sizes or not all(
        isinstance(shape, list | tuple) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        for shape in sizes
    ):
        raise ValueError(
            f"`{field}` must hold [key/value heads, key head_dim, value head_dim] per layer, but got {shapes!r:.60}."
        )


def _check_text(field: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{field}` must be a string or None, but got {value!r:.60}.")


def _check_integer(field: str, value: object, smallest: int) -> None:
    # True and False are integers for `isinstance`.
    if type(value) is not int or value < smallest:
        raise ValueError(f"`{field}` must be an integer of at least {smallest}, but got {value!r}.")
