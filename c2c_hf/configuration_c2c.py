"""`C2CConfig`: which models share, which layers meet, how large the fuser is and which tokens read which."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

LAYER_ALIGNMENTS = ("terminal", "depth_normalized")
TOKEN_ALIGNMENTS = ("identity", "first", "longest", "span")
CONTEXT_MODES = ("slice", "memory")
FUSION_MODES = ("parallel", "sequential")
FUSER_TYPES = ("c2c",)
FUSER_INITIALIZATIONS = ("shut_gates", "zero_output")

_READ_OFF_MODELS = (
    *("receiver_name_or_path", "receiver_revision", "receiver_config", "receiver_fingerprint"),
    *("sharer_names_or_paths", "sharer_revisions", "sharer_configs", "sharer_fingerprints"),
    *("receiver_layer_shapes", "sharer_layer_shapes", "receiver_tokenizer_hash", "sharer_tokenizer_hashes"),
    "sharer_rotations",
)

#: (num_key_value_heads, key head_dim, value head_dim) of one cached layer.
LayerShape = tuple[int, int, int]


class FuserSizes(NamedTuple):
    """Sizes of one sharer's fuser."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    dropout: float


def layer_mapping(num_receiver_layers: int, num_sharer_layers: int, layer_alignment: str = "terminal") -> list[int]:
    """Say which sharer layer each receiver layer reads.

    Args:
        num_receiver_layers: Number of layers in the receiver's cache.
        num_sharer_layers: Number of layers in the sharer's cache.
        layer_alignment: `"terminal"` pairs the last layers and walks down, surplus receiver layers reading sharer
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


class C2CConfig(PreTrainedConfig):
    """Configuration of a [`C2CForCausalLM`].

    Fields of the fuser carry a `fuser_` prefix because transformers reads `hidden_size` and its friends off a
    configuration as the language model's; [`C2CConfig.get_text_config`] answers with the receiver's.

    Args:
        receiver_name_or_path: Hub id or folder of the model that answers.
        receiver_revision: Commit, tag or branch of the receiver. `None` for a local folder.
        sharer_names_or_paths: Hub ids or folders of the models that lend their key/value states, in order.
        sharer_revisions: One revision (or `None`) per sharer.
        receiver_config: Nested configuration of the receiver, or its dictionary.
        sharer_configs: Nested configurations of the sharers, or their dictionaries, in order.
        receiver_layer_shapes: Per cached receiver layer `[num_key_value_heads, key head_dim, value head_dim]`, read
            off the model when the fuser is built and compared when it is loaded again.
        sharer_layer_shapes: The same, one list per sharer.
        receiver_fingerprint: Short hash of the receiver's weights, compared on loading. `None`: not compared.
        sharer_fingerprints: One hash (or `None`) per sharer.
        receiver_tokenizer_hash: Short hash of the receiver's vocabulary, compared where weights cannot be.
        sharer_tokenizer_hashes: One hash (or `None`) per sharer.
        fuser_type: `"c2c"`, the projector of arXiv 2510.03215.
        fuser_hidden_size: Width inside the fuser. Compact fusers go down to 64. This and the next three take one
            value, or a list with one per sharer.
        fuser_intermediate_size: Width inside the fuser's feed-forward blocks.
        num_fuser_layers: Depth of the fuser, input projection included; at least 2.
        fuser_dropout: Dropout in the feed-forward blocks while training.
        fuser_initialization: How a new fuser changes nothing. `"shut_gates"`: all gates at logit 0, which is shut at
            inference, in front of random output layers (arXiv 2510.03215); training starts by adding noise.
            `"zero_output"`: gates open at logit 1 in front of output layers that are zero, as LoRA starts.
        initial_gate_temperature: Temperature of the gates when training starts.
        final_gate_temperature: Temperature of the gates when training ends; between them it decays exponentially.
        layer_alignment: `"terminal"` or `"depth_normalized"`, see [`layer_mapping`].
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`: how a receiver token finds the sharer token
            it reads. One value per sharer where they differ.
        context_mode: How a sharer-only context reaches the receiver. `"slice"`: through the aligned positions of the
            text that both read. `"memory"`: its tokens' states take positions of their own in the receiver's cache;
            what both read is not fused then.
        memory_source_layers: Number of sharer layers, around its relative depth, that each receiver layer's memory is
            made from.
        memory_sink_tokens: Number of the receiver's own tokens in front of the memory, its attention sink.
        memory_rank: Width of the bottleneck of the maps. `None`: full rank.
        memory_shared_bottleneck: All receiver layers are made from one bottleneck of `memory_rank`, and that from all
            sharer layers (`memory_source_layers` has no say): far fewer weights for the same rank.
        sharer_rotations: Per sharer of a saved memory fuser how the keys of its layers turn with their position, see
            [`~rope.describe_rotations`], so that the states of one that runs elsewhere can be used.
        memory_hidden_size: Width of the residual network beside the maps. 0: none.
        fusion_mode: With several sharers, `"parallel"` sums the changes that every fuser computes on the receiver's
            own states, `"sequential"` hands each fuser what the one before it made.
        sharer_bos_token_ids: The token with which each sharer's text starts under `"first"` and `"longest"`, where the
            receiver's tokens alone would give it none. `None`: no such token.
        fuse_response: Keep fusing for answer tokens. Costs one more pass of the receiver and one of each sharer per
            token, and needs an alignment that goes token by token (all but `"span"`).

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    model_type = "c2c"

    receiver_name_or_path: str | None = None
    receiver_revision: str | None = None
    sharer_names_or_paths: list[str | None] | None = None
    sharer_revisions: list[str | None] | None = None
    receiver_config: PreTrainedConfig | dict[str, Any] | None = None
    sharer_configs: list[PreTrainedConfig | dict[str, Any]] | None = None
    receiver_layer_shapes: list[list[int]] | None = None
    sharer_layer_shapes: list[list[list[int]]] | None = None
    receiver_fingerprint: str | None = None
    sharer_fingerprints: list[str | None] | None = None
    receiver_tokenizer_hash: str | None = None
    sharer_tokenizer_hashes: list[str | None] | None = None
    fuser_type: str = "c2c"
    fuser_hidden_size: int | list[int] = 1024
    fuser_intermediate_size: int | list[int] = 1024
    num_fuser_layers: int | list[int] = 3
    fuser_dropout: float | list[float] = 0.1
    fuser_initialization: str = "shut_gates"
    initial_gate_temperature: float = 1.0
    final_gate_temperature: float = 0.001
    layer_alignment: str = "terminal"
    token_alignment: str | list[str] = "span"
    sharer_bos_token_ids: list[int | None] | None = None
    context_mode: str = "slice"
    memory_source_layers: int = 3
    memory_sink_tokens: int = 1
    memory_rank: int | None = None
    memory_shared_bottleneck: bool = False
    memory_hidden_size: int = 0
    sharer_rotations: list[dict[str, Any]] | None = None
    fusion_mode: str = "parallel"
    fuse_response: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.receiver_config = _as_config(self.receiver_config)
        if self.sharer_configs is not None:
            self.sharer_configs = [_as_config(config) for config in self.sharer_configs]
        super().__post_init__(**kwargs)
        self._check_fields()

    def _check_fields(self) -> None:
        for field, allowed in (
            ("fuser_type", FUSER_TYPES),
            ("fuser_initialization", FUSER_INITIALIZATIONS),
            ("layer_alignment", LAYER_ALIGNMENTS),
            ("context_mode", CONTEXT_MODES),
            ("fusion_mode", FUSION_MODES),
        ):
            _check_choice(field, getattr(self, field), allowed)
        alignments = self._per_sharer("token_alignment")
        for value in alignments:
            _check_choice("token_alignment", value, TOKEN_ALIGNMENTS)
        if self.fuse_response and "span" in alignments:
            raise ValueError(
                "`fuse_response=True` needs a `token_alignment` that goes token by token ('identity', 'first' or "
                f"'longest'), but got {self.token_alignment!r}."
            )
        if self.context_mode == "memory" and set(alignments) != {"span"}:
            raise ValueError(
                f"`context_mode='memory'` needs `token_alignment='span'`, but got {self.token_alignment!r}: a sharer "
                "reads a text of its own."
            )
        for field, smallest in (("memory_source_layers", 1), ("memory_sink_tokens", 0), ("memory_hidden_size", 0)):
            _check_integer(field, getattr(self, field), smallest)
        if self.memory_rank is not None:
            _check_integer("memory_rank", self.memory_rank, 1)
        elif self.memory_shared_bottleneck:
            raise ValueError("`memory_shared_bottleneck` needs `memory_rank`, its width, but that is None.")
        optional = ("sharer_revisions", "sharer_fingerprints", "sharer_tokenizer_hashes", "sharer_bos_token_ids")
        for field in ("sharer_names_or_paths", *optional):
            if getattr(self, field) is not None:
                self._per_sharer(field)
        for field, smallest in (("fuser_hidden_size", 1), ("fuser_intermediate_size", 1), ("num_fuser_layers", 2)):
            for value in self._per_sharer(field):
                _check_integer(field, value, smallest)
        for value in self._per_sharer("fuser_dropout"):
            if not isinstance(value, float | int) or not 0.0 <= value < 1.0:
                raise ValueError(f"`fuser_dropout` must be in [0, 1), but got {value!r}.")
        for field in ("initial_gate_temperature", "final_gate_temperature"):
            if not isinstance(getattr(self, field), float | int):
                raise ValueError(f"`{field}` must be a number, but got {getattr(self, field)!r}.")
        if not 0.0 < self.final_gate_temperature <= self.initial_gate_temperature:
            raise ValueError(
                "Gate temperatures must satisfy 0 < `final_gate_temperature` <= `initial_gate_temperature`, but got "
                f"{self.final_gate_temperature!r} and {self.initial_gate_temperature!r}."
            )

    @classmethod
    def check_names(cls, names: Iterable[str], by_user: bool = False) -> None:
        """Refuse what is no field, which transformers would keep as an attribute that nobody reads.

        Args:
            names: Of the fields.
            by_user: Refuse those that are read off the base models, too.

        Raises:
            ValueError: Naming them.
        """
        names = list(names)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"These are no fields of `C2CConfig`: {unknown}; see its documentation for those there are."
            )
        found_out = [name for name in names if name in _READ_OFF_MODELS]
        if by_user and found_out:
            raise ValueError(f"These fields are read off the models and cannot be given: {found_out}.")

    @property
    def num_sharers(self) -> int:
        """Number of sharers."""
        return len(self.sharer_configs) if self.sharer_configs is not None else 0

    @property
    def token_alignments(self) -> list[str]:
        """The token alignment of each sharer."""
        return self._per_sharer("token_alignment")

    def fuser_sizes(self, sharer_index: int) -> FuserSizes:
        """Return the sizes of one sharer's fuser."""
        fields = ("fuser_hidden_size", "fuser_intermediate_size", "num_fuser_layers", "fuser_dropout")
        return FuserSizes(*(self._per_sharer(field)[sharer_index] for field in fields))

    def _per_sharer(self, field: str) -> list[Any]:
        """Spread a field that holds one value over all sharers."""
        value = getattr(self, field)
        if not isinstance(value, list | tuple):
            return [value] * max(1, self.num_sharers)
        if len(value) != self.num_sharers:
            raise ValueError(
                f"`{field}` must be one value, or one per sharer ({self.num_sharers}), but got {value!r}."
            )
        return list(value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the receiver's text configuration, which is what generation and caches need to know."""
        if not isinstance(self.receiver_config, PreTrainedConfig):
            return self
        return self.receiver_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, nested ones included."""
        receiver_config, sharer_configs = self.receiver_config, self.sharer_configs
        # The base class copies every attribute but turns only direct configurations into dictionaries.
        output = super().to_dict()
        output["receiver_config"] = _as_dict(receiver_config)
        output["sharer_configs"] = None if sharer_configs is None else [_as_dict(config) for config in sharer_configs]
        return output


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise ValueError(f"`receiver_config` and `sharer_configs` must hold configurations, but got {config!r}.")
    fields = dict(config)
    if not isinstance(fields.get("model_type"), str):
        raise ValueError("A nested base model configuration needs its `model_type`, but the dictionary has none.")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _as_dict(config: PreTrainedConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    # The folder that a base model was loaded from stands in `receiver_name_or_path` alone.
    return {
        key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }


def _check_integer(field: str, value: Any, smallest: int) -> None:
    if not isinstance(value, int) or value < smallest:
        raise ValueError(f"`{field}` must be an integer of at least {smallest}, but got {value!r}.")


def _check_choice(field: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {list(allowed)}, but got {value!r}.")
