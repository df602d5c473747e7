"""`C2CPreTrainedModel`: how a receiver, its sharers and their fusers are built, loaded and saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .alignment.token_table import build_token_table, own_bos_token_id
from .checkpoints.absent_sharer import AbsentSharer
from .checkpoints.base_models import (
    VERIFY_HINT,
    BaseModel,
    base_models_to_load,
    check_base_model,
    load_base_model,
    load_tokenizer,
    per_sharer_kwargs,
    record_layer_shapes,
    resolve_alignments,
    resolve_revision,
    verify_base_model,
)
from .checkpoints.fuser_weights import check_fuser_weights, load_fuser_weights
from .checkpoints.receiver_adapter import load_adapter, set_adapter_mode
from .configuration_c2c import C2CConfig, SharerConfig
from .fusers.c2c import C2CFuser, FuserGroup
from .fusers.memory import MemoryFuser
from .hub.download import HUB_KWARGS, check_subfolder
from .inference.fingerprints import fingerprint, tokenizer_hash
from .inference.prefill import input_device
from .saving import C2CSavingMixin


class C2CPreTrainedModel(C2CSavingMixin):
    """A receiver, its sharers and the fusers between them (Cache-to-Cache, arXiv 2510.03215).

    Everything but `fuser` is frozen. Saved folders hold the fuser alone and name the base models.

    Args:
        config: The pair, the fuser's sizes and the alignment.
        receiver: The model that answers; `None`: made from `config.receiver_config` with random weights.
        sharers: The models that lend their states; `None`: made from `config.sharers` likewise.

    Raises:
        ValueError: A base model has no plain key/value cache, or other shapes than the configuration records.
    """

    config_class = C2CConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: C2CConfig,
        receiver: PreTrainedModel | None = None,
        sharers: Sequence[PreTrainedModel | AbsentSharer] | None = None,
    ) -> None:
        super().__init__(config)
        if receiver is None:
            if config.receiver_config is None:
                raise ValueError(
                    "`config.receiver_config` is missing; build the model with `from_receiver_and_sharers`."
                )
            receiver = AutoModelForCausalLM.from_config(config.receiver_config)
        if sharers is None:
            sharers = [AutoModelForCausalLM.from_config(sharer.config) for sharer in config.sharers]
        if not sharers or len(sharers) != config.num_sharers:
            raise ValueError(
                f"`sharers` must hold at least one model and as many as the configuration names "
                f"({config.num_sharers}), but got {len(sharers)}."
            )
        # The receiver comes first: transformers takes a model's device and dtype from its first parameter.
        self.receiver = receiver.requires_grad_(False).eval()
        self.sharers = nn.ModuleList(sharer.requires_grad_(False).eval() for sharer in sharers)
        record_layer_shapes(config, receiver, sharers)
        fuser_class = MemoryFuser if config.mode == "memory" else C2CFuser
        self.fuser: Any = nn.ModuleList(fuser_class(config, sharer) for sharer in config.sharers)
        self.fuser.to(device=input_device(receiver))
        for index, alignment in enumerate(config.token_alignments):
            size = receiver.get_input_embeddings().weight.shape[0]
            table = torch.full((size,), -1) if alignment in ("first", "longest") else None
            self.register_buffer(f"token_table_{index}", table)
        self.fusion_enabled = True
        self.generation_config = receiver.generation_config
        self.config._attn_implementation_internal = receiver.config._attn_implementation
        self.post_init()

    @classmethod
    def from_receiver_and_sharers(
        cls,
        receiver: BaseModel,
        sharers: BaseModel | Sequence[BaseModel],
        receiver_kwargs: dict[str, Any] | None = None,
        sharer_kwargs: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        token_alignment: str | list[str] | None = None,
        **config_fields: Any,
    ) -> "C2CPreTrainedModel":
        """Build an untrained pair: its gates are shut, so that it answers as the receiver does.

        Args:
            receiver: Hub id, folder or loaded model.
            sharers: One of these, or a list.
            receiver_kwargs: Arguments of the receiver's own `from_pretrained`.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            token_alignment: See [`C2CConfig`]. `None`: `"identity"` between equal vocabularies, else `"span"`.
            **config_fields: Fields of [`C2CConfig`].

        Raises:
            ValueError: For models or values that do not go together.
        """
        C2CConfig.check_names(config_fields, by_user=True)
        sharers = [sharers] if isinstance(sharers, str | Path | PreTrainedModel) else list(sharers)
        if not sharers:
            raise ValueError("`sharers` must name at least one model, but the list is empty.")
        all_sharer_kwargs = per_sharer_kwargs(sharer_kwargs, len(sharers))
        loaded = [load_base_model(receiver, "receiver", receiver_kwargs or {})]
        loaded += [
            load_base_model(sharer, "sharers", kwargs)
            for sharer, kwargs in zip(sharers, all_sharer_kwargs, strict=True)
        ]
        models, names, revisions = (list(column) for column in zip(*loaded, strict=True))
        tokenizers = [
            load_tokenizer(name, kwargs)
            for name, kwargs in zip(names, [receiver_kwargs or {}, *all_sharer_kwargs], strict=True)
        ]
        if config_fields.get("mode") == "memory":
            token_alignment = token_alignment or "span"
        alignments = resolve_alignments(token_alignment, models, tokenizers)
        hashes = [None if tokenizer is None else tokenizer_hash(tokenizer) for tokenizer in tokenizers]
        config = C2CConfig(
            receiver_name_or_path=names[0],
            receiver_revision=revisions[0],
            receiver_config=models[0].config,
            receiver_fingerprint=fingerprint(models[0]),
            receiver_tokenizer_hash=hashes[0],
            sharers=[
                SharerConfig(name, revision, model.config, None, fingerprint(model), tokenizer_hash, alignment)
                for name, revision, model, tokenizer_hash, alignment in zip(
                    names[1:], revisions[1:], models[1:], hashes[1:], alignments, strict=True
                )
            ],
        )
        config.override(config_fields)
        model = cls(config, models[0], models[1:])
        for index, alignment in enumerate(alignments):
            if alignment in ("first", "longest"):
                model.set_token_table(index, tokenizers[0], tokenizers[index + 1])
        return model.eval()

    def set_token_table(self, sharer_index: int, receiver_tokenizer: Any, sharer_tokenizer: Any) -> None:
        """Build the lookup table of the `"first"` and `"longest"` alignments; it is saved with the fuser.

        Args:
            sharer_index: Which sharer.
            receiver_tokenizer: The receiver's tokenizer.
            sharer_tokenizer: That sharer's tokenizer.

        Raises:
            ValueError: A tokenizer is missing.
        """
        strategy = self.config.token_alignments[sharer_index]
        if receiver_tokenizer is None or sharer_tokenizer is None:
            raise ValueError(
                f"`token_alignment={strategy!r}` needs both tokenizers, but a loaded model without a name or path "
                "brings none; pass names, or call `set_token_table`."
            )
        table: torch.Tensor = getattr(self, f"token_table_{sharer_index}")
        built = build_token_table(receiver_tokenizer, sharer_tokenizer, strategy, vocab_size=len(table))
        table.copy_(built[: len(table)])
        self.config.sharers[sharer_index].bos_token_id = own_bos_token_id(sharer_tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: C2CConfig | None = None,
        receiver: BaseModel | None = None,
        sharers: BaseModel | Sequence[BaseModel] | None = None,
        receiver_kwargs: dict[str, Any] | None = None,
        sharer_kwargs: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        verify_base_models: bool = True,
        load_sharers: bool = True,
        **kwargs: Any,
    ) -> "C2CPreTrainedModel":
        """Load a saved fuser together with its base models.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the fuser.
            config: Used in place of the saved configuration.
            receiver: A loaded receiver, or another place of the same; `None`: by the recorded name and revision.
            sharers: The same for the sharers.
            receiver_kwargs: Arguments of the receiver's own `from_pretrained`.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            dtype: Precision of the base models; the fuser stays in float32 and computes in the receiver's. For
                inference alone, `model.fuser.to(dtype)` spares a second copy of its weights and changes no result.
            device_map: Placement of each base model.
            attn_implementation: Attention of the base models, such as `"flash_attention_2"`.
            verify_base_models: Compare the base models' weights and revisions with those recorded; of quantized ones,
                whose weights cannot be compared, the vocabularies.
            load_sharers: Off, no sharer is loaded: what they have read comes as `sharer_caches`.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder` say where the
                fuser is on the Hub; fields of [`C2CConfig`] override the saved ones.

        Raises:
            ValueError: The checkpoint or the base models do not fit.
            OSError: A file is missing.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if value is not None}
        # The Auto classes hand these over; code of base models is asked for in `receiver_kwargs` and `sharer_kwargs`.
        for key in ("trust_remote_code", "_from_auto", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(key, None)
        for key in ("gguf_file", "quantization_config", "max_memory"):
            # lm-evaluation-harness hands these to every model, as None where it asks for nothing.
            if key in kwargs and kwargs[key] is None:
                del kwargs[key]
        check_subfolder(hub_kwargs.get("subfolder"))
        if not isinstance(config, C2CConfig):
            config = C2CConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if config.num_sharers == 0:
            raise ValueError(
                f"`pretrained_model_name_or_path`: {str(pretrained_model_name_or_path)!r} is no saved fuser, since "
                "its configuration names no sharer."
            )
        legacy_dtype = kwargs.pop("torch_dtype", None)
        dtype = legacy_dtype if dtype is None else dtype
        if getattr(config.receiver_config, "_attn_implementation", None) is None:
            # The Auto classes write this argument into the configuration that they load. A living model's, whose parts
            # know theirs, is not asked: the receiver's need not suit the sharers.
            attn_implementation = attn_implementation or config._attn_implementation
        shared = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        shared = {key: value for key, value in shared.items() if value is not None}
        config.override(kwargs)
        # Configuration and weights must be those of one commit, also where the repository changes in between.
        revision = resolve_revision(str(pretrained_model_name_or_path), hub_kwargs)
        hub_kwargs.update({} if revision is None else {"revision": revision})
        hub_access: dict[str, Any] = {
            key: hub_kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in hub_kwargs
        }
        if sharers is not None and not load_sharers:
            raise ValueError("`sharers` must be None with `load_sharers=False`, which leaves them out.")
        base_models = base_models_to_load(config, receiver, sharers, load_sharers)
        all_kwargs = [receiver_kwargs or {}, *per_sharer_kwargs(sharer_kwargs, config.num_sharers)]
        revisions = [config.receiver_revision, *(sharer.revision for sharer in config.sharers)]
        fingerprints = [config.receiver_fingerprint, *(sharer.fingerprint for sharer in config.sharers)]
        models = []
        for index, (base, base_kwargs) in enumerate(zip(base_models, all_kwargs, strict=True)):
            role = "receiver" if index == 0 else "sharers"
            if isinstance(base, AbsentSharer):
                models.append(base)
                continue
            handed_over = (receiver if index == 0 else sharers) is not None
            recorded = {} if handed_over or revisions[index] is None else {"revision": revisions[index]}
            model, _, revision = load_base_model(base, role, {**shared, **hub_access, **recorded, **base_kwargs})
            # Of a model from elsewhere, which has commits of its own, the weights decide.
            if verify_base_models and not handed_over:
                check_base_model(role, "revision", revisions[index], revision, VERIFY_HINT)
            models.append(model)
        built = cls(config, models[0], models[1:])
        if verify_base_models:
            hashes = [config.receiver_tokenizer_hash, *(sharer.tokenizer_hash for sharer in config.sharers)]
            for index, model in enumerate(models):
                role = "receiver" if index == 0 else "sharers"
                verify_base_model(role, model, fingerprints[index], hashes[index], {**hub_access, **all_kwargs[index]})
        weights = load_fuser_weights(pretrained_model_name_or_path, hub_kwargs)
        check_fuser_weights(weights, built._own_state_dict())
        built.load_state_dict(weights, strict=False)
        load_adapter(built.receiver, pretrained_model_name_or_path, hub_kwargs)
        built.name_or_path = config.name_or_path or str(pretrained_model_name_or_path)
        return built.eval()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Let the fusers compute their hidden states twice rather than keep them; base models go on as they are.

        They are frozen, and their layers would drop the cache. What transformers hands over besides is not needed.
        """
        for module in self.fuser.modules():
            if isinstance(module, FuserGroup):
                module.gradient_checkpointing = enable

    def enable_input_require_grads(self) -> None:
        """Do nothing: the fusers' weights take gradients by themselves, whatever the receiver's embeddings do."""

    @contextmanager
    def disable_fusion(self) -> Iterator["C2CPreTrainedModel"]:
        """Switch fusion off: within this context every output equals the receiver's own."""
        enabled, self.fusion_enabled = self.fusion_enabled, False
        try:
            yield self
        finally:
            self.fusion_enabled = enabled

    def init_weights(self) -> None:
        """Leave all weights as they are: base models come initialised, fusers initialise themselves."""

    def train(self, mode: bool = True) -> "C2CPreTrainedModel":
        """Set the mode of the fuser and of an adapter's dropout; base models stay in evaluation mode."""
        super().train(mode)
        set_adapter_mode(self.receiver.eval(), mode)
        self.sharers.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the receiver's input embeddings."""
        return self.receiver.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the receiver's output embeddings."""
        return self.receiver.get_output_embeddings()
