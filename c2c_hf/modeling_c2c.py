"""`C2CForCausalLM`: a frozen receiver, frozen sharers and the fusers between their key/value caches."""

import copy
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import CONFIG_NAME, can_return_tuple, logging

from ._compat import CACHE_ARGUMENT, accepts_argument, pop_cache
from ._files import staged_folder
from .alignment.token_table import build_token_table, own_bos_token_id, resolve_alignments
from .checkpoints.base_models import (
    AbsentSharer,
    BaseModel,
    find_tokenizer,
    kwargs_per_sharer,
    load_base_model,
    load_base_models,
    record_layer_shapes,
    resolve_revision,
    verify_weights,
)
from .checkpoints.download import HUB_KWARGS, check_subfolder
from .checkpoints.fuser_weights import (
    check_fuser_weights,
    check_sizes,
    is_own_weight,
    load_fuser_weights,
    quantize,
)
from .checkpoints.receiver_adapter import (
    ADAPTER_FOLDER,
    ADAPTER_FOLDERS,
    SHARER_ADAPTER_FOLDER,
    has_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
    set_adapter_mode,
    trains,
)
from .checkpoints.remote_code import write_code
from .configuration_c2c import C2CConfig, SharerConfig
from .fusers import build_fusers, fuser_state_dict
from .fusers.c2c import C2CFuser, FuserGroup
from .fusers.memory import MemoryFuser
from .hub.publish import publish_fuser
from .inference.cache import C2CCache, RecordingCache
from .inference.fingerprints import fingerprint, tokenizer_hash
from .inference.fusion import (
    FusionPlan,
    KeyPositions,
    default_alignment,
    fuse_states,
    last_prompt_positions,
    plan_fusion,
)
from .inference.inputs import (
    GivenCaches,
    GivenSharerInputs,
    ModelInputs,
    PerSharer,
    ReceiverInputs,
    SharerInputs,
    cache_per_sharer,
    cached_length,
    collect_fusion_inputs,
    collect_memory_inputs,
    new_alignment,
    prefill_given_inputs,
    sharer_inputs_from_caller,
    sharer_inputs_from_tokens,
    tensor_per_sharer,
)
from .inference.memory_slots import (
    MemoryPlan,
    fill_memory_slots,
    plan_memory_slots,
    prefill_leading_tokens,
    slot_positions,
)
from .inference.pair_settings import PairSettings, check_settings, settings_of_config
from .inference.prefill import (
    LayerStates,
    cached_states,
    full_length_cache,
    input_device,
    last_positions,
    prefill,
    run_concurrently,
    takes_position_ids,
)
from .inference.probe import check_length, check_padding, first_position
from .inference.rotary import Rotation, describe_rotations, layer_rotations, read_rotations
from .inference.sharer_cache import SharerCache, prefill_sharer
from .processing_c2c import C2CProcessor

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)

_SHARER_TENSORS = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment", "sharer_position_ids")
#: Arguments of `forward` and `generate` beside those of every causal language model.
SHARER_ARGUMENTS = (*_SHARER_TENSORS, "sharer_caches", "sharer_settings")
#: What `save_pretrained(push_to_hub=True)` hands on to `push_to_hub`.
_PUSH_ARGUMENTS = (
    *("repo_id", "token", "private", "revision", "create_pr", "commit_message", "commit_description", "subfolder"),
    *("processor", "receiver", "sharers", "card", "license", "evaluation", "training", "datasets", "tags"),
)
#: Arguments of transformers' `from_pretrained` that go to every base model.
_BASE_MODEL_ARGUMENTS = ("quantization_config", "max_memory", "offload_folder", "offload_buffers", "tqdm_class")
#: Those without effect: in transformers, or here, where code of base models is allowed in `receiver_kwargs` and
#: `sharer_kwargs`. The Auto classes hand over some of them.
_IGNORED_ARGUMENTS = (
    *("trust_remote_code", "adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"),
    *("low_cpu_mem_usage", "offload_state_dict", "mirror", "_fast_init", "from_tf", "from_flax"),
)
#: Models whose fusion is off in the current context, by identity. Other threads and tasks have contexts of their own.
_fusion_disabled: ContextVar[frozenset[int]] = ContextVar("c2c_fusion_disabled", default=frozenset())
_count_lock = Lock()


#: The receiver's own key/value states, and the requested logits (`None`: none requested).
ReceiverPrefill: TypeAlias = tuple[LayerStates, torch.Tensor | None]


def run_receiver(
    receiver: PreTrainedModel,
    inputs: ReceiverInputs,
    cache: Cache | None,
    labels: torch.Tensor | None,
    use_cache: bool | None,
    logits_to_keep: int | torch.Tensor,
    kwargs: dict[str, Any],
) -> CausalLMOutputWithPast:
    """Run the receiver's forward pass with the arguments that its architecture accepts.

    Args:
        receiver: The receiver.
        inputs: Its inputs.
        cache: Grows by the new tokens; `None`: left to the model.
        labels: `(batch_size, seq_len)`, or `None`.
        use_cache: Whether to return the cache; `None`: the model's default.
        logits_to_keep: Number of last positions, 0 for all; or the positions.
        kwargs: Further arguments of the receiver.
    """
    call: dict[str, Any] = {**kwargs, "attention_mask": inputs.attention_mask, "use_cache": use_cache}
    call |= {"input_ids": inputs.input_ids, CACHE_ARGUMENT: cache}
    if inputs.inputs_embeds is not None:
        call["inputs_embeds"] = inputs.inputs_embeds
    if inputs.position_ids is not None and takes_position_ids(receiver):
        call["position_ids"] = inputs.position_ids
    keeps_some = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep
    if keeps_some and accepts_argument(receiver, "logits_to_keep"):
        call["logits_to_keep"] = logits_to_keep
        if labels is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            labels = labels[:, kept]
    if labels is not None:
        call["labels"] = labels
    return receiver(**call)


def continue_receiver(
    receiver: PreTrainedModel,
    states: LayerStates,
    tail_start: int,
    tail_mask: torch.Tensor | None,
    inputs: ReceiverInputs,
    cache: Cache,
    num_kept: int,
    kwargs: dict[str, Any],
) -> CausalLMOutputWithPast | None:
    """Write precomputed states before the tail into the cache, then run the receiver over the tail.

    Args:
        receiver: The receiver.
        states: Per layer keys and values `(batch_size, num_key_value_heads, length, head_dim)`; the list is
            emptied.
        tail_start: First position of the tail.
        tail_mask: `(batch_size, tail length)`, bool: where `states` replace those that the receiver computes. `None`:
            nowhere.
        inputs: The receiver's inputs.
        cache: Grows by all new tokens.
        num_kept: Number of last positions whose logits are wanted.
        kwargs: Passed on to the receiver.

    Returns:
        The receiver's output, or `None` where there is no tail.
    """
    seq_len = inputs.seq_len
    tail_length = seq_len - tail_start
    tail_states = []
    if tail_mask is not None:
        # Copied before the states in front of the tail go, layer by layer, into the cache.
        tail_states = [
            (_tail(keys, tail_start, tail_length), _tail(values, tail_start, tail_length)) for keys, values in states
        ]
    if tail_start > 0:
        # Each layer's states are released as soon as they are in the cache.
        states.reverse()
        for layer_idx in range(len(states)):
            keys, values = states.pop()
            cache.update(keys[:, :, :tail_start], values[:, :, :tail_start], layer_idx)
    if tail_length == 0:
        return None
    tail = inputs.columns(tail_start, seq_len)
    kept = last_positions(tail.tokens, num_kept) if num_kept < tail_length else 0
    if tail_mask is None:
        return run_receiver(receiver, tail, cache, None, True, kept, kwargs)
    fused_cache = cache if isinstance(cache, C2CCache) else C2CCache(cache)
    with fused_cache.replacing_states(tail_states, tail_mask):
        return run_receiver(receiver, tail, fused_cache, None, True, kept, kwargs)


def _tail(states: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Return the states from `start` on, padded to `length` positions."""
    rest = states[:, :, start:]
    return nn.functional.pad(rest, (0, 0, 0, length - rest.shape[2]))


class C2CForCausalLM(PreTrainedModel, GenerationMixin):
    """A receiver, its sharers and the fusers between them (Cache-to-Cache, arXiv 2510.03215).

    All models prefill the prompt, and the fused states enter the receiver's cache. After the prefill only the
    receiver runs (unless `fuse_response`). Everything but `fuser` is frozen. Saved folders hold the fuser alone and
    name the base models.

    Args:
        config: The pair, the fuser's sizes and the alignment.
        receiver: The model that answers; `None`: made from `config.receiver_config` with random weights.
        sharers: The models whose states are fused; `None`: made from `config.sharers` likewise.

    Raises:
        ValueError: A base model has no plain key/value cache, or other shapes than the configuration records.

    Example:
        ```python
        model = C2CForCausalLM.from_receiver_and_sharers("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct")
        processor = C2CProcessor.from_receiver_and_sharers("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct")
        inputs = processor("The capital of France is")
        out = model.generate(**inputs, max_new_tokens=8)
        ```
    """

    config: C2CConfig
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
        config.receiver_embedding_size = receiver.get_input_embeddings().weight.shape[1]
        self._first_position = first_position(receiver, "receiver")
        self.fuser = nn.ModuleList(build_fusers(config))
        self.fuser.to(device=input_device(receiver))
        for index, alignment in enumerate(config.token_alignments):
            size = receiver.get_input_embeddings().weight.shape[0]
            table = torch.full((size,), -1) if alignment in ("first", "longest") else None
            self.register_buffer(f"token_table_{index}", table)
        self._rotations: list[list[Rotation]] | None = None
        #: In how many contexts, of all threads, fusion is off.
        self._num_disabling_contexts = 0
        self.generation_config = receiver.generation_config
        self.config._attn_implementation_internal = receiver.config._attn_implementation
        self.post_init()

    # ------------------------------------------------------------------ one forward pass

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sharer_input_ids: PerSharer | None = None,
        sharer_attention_mask: PerSharer | None = None,
        sharer_alignment: PerSharer | None = None,
        sharer_position_ids: PerSharer | None = None,
        past_key_values: Cache | None = None,
        sharer_caches: GivenCaches | None = None,
        sharer_settings: PerSharer | None = None,
        sharer_inputs_embeds: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        sharer_model_inputs: ModelInputs | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Prefill a prompt with all models and fuse, or decode further tokens.

        Args:
            input_ids: `(batch_size, seq_len)`, the receiver's tokens; with a cache the new ones only.
            attention_mask: `(batch_size, past_len + seq_len)`, 0 at padding on either side. `None`: no padding.
            position_ids: `(batch_size, seq_len)`. `None`: counted from the mask. With `token_alignment="identity"`
                also used for the sharer, as positions counted from 0.
            cache: The receiver's cache: any of transformers', or a [`C2CCache`], into which `fuse_response` wraps it.
                `None`: a new one.
            inputs_embeds: `(batch_size, seq_len, hidden_size)` in place of `input_ids`.
            labels: `(batch_size, seq_len)`, -100 where there is no loss. The prompt ends before the first label.
            use_cache: Whether to return the cache.
            logits_to_keep: Number of last positions to compute logits for, 0 for all; or the positions, picked out of
                all logits.
            sharer_input_ids: `(batch_size, sharer_len)`, the sharer's tokens of the whole text, earlier turns
                included; with several sharers a list. `None`: made from `input_ids` with `token_alignment`
                `"identity"`, `"first"` or `"longest"`; on a cache that is not empty the new tokens are then decoded
                without fusion, unless `fuse_response`. In memory mode: no context.
            sharer_attention_mask: `(batch_size, sharer_len)`. `None`: no padding.
            sharer_alignment: `(batch_size, seq_len)`, or for the whole text: the sharer position aligned with each
                receiver position, or -1. Exactly the aligned positions are fused; with `fuse_response` all from the
                last prompt position on as well. `None`: all but the last prompt position, each with the same position
                of the sharer. In memory mode, where it is required: the sharer position that fills each slot, or -1.
            sharer_position_ids: `(batch_size, sharer_len)`, counted from 0. `None`: counted from the mask.
            past_key_values: The name of `cache` before transformers 5.24.
            sharer_caches: The sharers' caches of `sharer_input_ids`, prefilled elsewhere, in place of running them
                here; with several sharers a list, `None` for those that run here. Not with `fuse_response`.
            sharer_settings: `(batch_size, 6)`, with several sharers a list: by these, inputs of a processor that is
                not this model's are refused. `None`: not compared.
            sharer_inputs_embeds: `(batch_size, sharer_len, hidden_size)`, prefilled in place of `sharer_input_ids`;
                with several sharers a list, `None` for those without. Not with `fuse_response`.
            sharer_model_inputs: Further arguments of the sharer's own forward pass, such as `{"pixel_values": ...}` of
                a vision-language model, whose image tokens are in `sharer_input_ids`; with several sharers a list. Not
                with `fuse_response`.
            **kwargs: Passed on to the receiver.

        Returns:
            Loss, logits `(batch_size, logits_to_keep or seq_len, vocab_size)` and cache. Logits of fused positions are
            the receiver's own. Hidden states and attentions, where requested, are those of the receiver's last pass,
            from the end of the shortest fused region (or the last slot) on.

        Raises:
            ValueError: Sharer inputs are missing, of the wrong shape, out of range or those of another processor, or a
                text is too long.
        """
        self.check_processor(sharer_settings)
        cache = past_key_values if cache is None else cache
        use_cache = self._read_output_settings(use_cache, kwargs)
        inputs = ReceiverInputs(input_ids, inputs_embeds, attention_mask, position_ids, self._first_position)
        given = GivenSharerInputs(
            sharer_input_ids, sharer_attention_mask, sharer_alignment, sharer_position_ids, sharer_caches
        )
        if self.fusion_enabled and (sharer_inputs_embeds is not None or sharer_model_inputs is not None):
            given = prefill_given_inputs(
                self.config, list(self.sharers), given, sharer_inputs_embeds, sharer_model_inputs
            )
        seq_len = inputs.seq_len
        num_kept = seq_len if isinstance(logits_to_keep, torch.Tensor) or not logits_to_keep else logits_to_keep

        # 1. Inputs for the sharers; none where the receiver runs without them.
        sharers: list[SharerInputs] = []
        if self.config.mode == "memory":
            inputs, sharers, cache = self._collect_memory_inputs(inputs, given, cache, use_cache)
        elif self.fusion_enabled:
            sharers = collect_fusion_inputs(self.config, self.token_tables, inputs, given, labels, cache)
            if sharers and given.input_ids is None and labels is None and num_kept == seq_len > 1:
                logger.warning_once(
                    "`forward` got token ids alone and no `labels` that say where the prompt ends: the logits of all "
                    "but the last position are the receiver's own. To score a continuation, pass `labels`."
                )
        # In `generate` the receiver has made position ids already; its mask may be four-dimensional then.
        if self.fusion_enabled and position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            inputs = inputs.with_positions()

        if isinstance(cache, C2CCache) and cache.hidden_positions is not None:
            inputs = _without_hidden_positions(inputs, cache)

        # 2. Plan: which positions get fused states or slot states.
        plan: FusionPlan | MemoryPlan | None = None
        if sharers and self.config.mode == "memory":
            plan = self._plan_memory_slots(sharers, inputs, cache, num_kept)
        elif sharers:
            plan = self._plan_fusion(sharers, inputs, labels, logits_to_keep)
        if plan is None:
            if sharers and self.config.fuse_response and isinstance(cache, C2CCache):
                self._prefill_unfused(inputs, cache)
            outputs = run_receiver(self.receiver, inputs, cache, labels, use_cache, logits_to_keep, kwargs)
            if isinstance(cache, C2CCache):
                cache.record_tokens(input_ids, attention_mask)
            return outputs

        self._check_no_checkpointing()

        # 3. Prefill the sharers, and the part of the receiver's prompt whose states do not depend on them.
        if cache is None:
            cache = DynamicCache(config=self.receiver.config.get_text_config())
        if self.config.fuse_response and not isinstance(cache, C2CCache):
            cache = C2CCache(cache)
        check_padding("receiver", self.receiver, inputs.attention_mask)
        inputs = inputs.with_positions(cached_length(cache))
        first_kept = max(0, seq_len - num_kept)
        prefill_receiver: Callable[[], ReceiverPrefill]
        if isinstance(plan, MemoryPlan):
            prefill_receiver = partial(self._prefill_leading_tokens, plan, inputs)
        else:
            prefill_receiver = partial(self._prefill_fused_region, plan, inputs, cache, first_kept)
        (states, unfused_logits), caches = self._prefill_models(prefill_receiver, sharers, plan.sharer_lengths, cache)

        # 4. Fill the memory slots, or fuse the receiver's states with the sharers' in place.
        if isinstance(plan, MemoryPlan):
            memory_fusers = cast(Sequence[MemoryFuser], self.fuser)
            states = fill_memory_slots(
                plan,
                memory_fusers,
                caches,
                sharers,
                self.rotations(),
                inputs,
                self.get_input_embeddings(),
                states,
                self.receiver.dtype,
            )
        else:
            fusers = cast(Sequence[C2CFuser], self.fuser)
            positions: list[KeyPositions] = []
            if self.config.unrotate_keys:
                ids = [inputs.positions(), *(sharer.positions() for sharer in sharers)]
                positions = [KeyPositions(*each) for each in zip(self.rotations(), ids, strict=True)]
            key_positions = (positions[0], positions[1:]) if positions else ()
            fuse_states(fusers, caches, states, plan.tokens, self.config.fusion_mode, *key_positions)

        # 5. Write these states into the cache and run the receiver over the remaining positions.
        tail_outputs = continue_receiver(
            self.receiver, states, plan.tail_start, plan.tail_mask(), inputs, cache, num_kept, kwargs
        )
        if isinstance(cache, C2CCache):
            cache.record_tokens(input_ids, attention_mask, [sharer.alignment for sharer in sharers])
        # Without remaining positions (fusion mode only) all requested logits are those of the unfused pass.
        logits = cast(torch.Tensor, unfused_logits)
        if tail_outputs is not None:
            logits = tail_outputs.logits[:, -min(num_kept, seq_len - plan.tail_start) :]
            if unfused_logits is not None and isinstance(plan, FusionPlan):
                logits = plan.join_logits(unfused_logits, logits, first_kept)
        loss = None
        if labels is not None:
            kept_labels = labels[:, labels.shape[1] - logits.shape[1] :].to(logits.device)
            loss = self.loss_function(logits=logits, labels=kept_labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits[:, logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else logits,
            hidden_states=None if tail_outputs is None else tail_outputs.get("hidden_states"),
            attentions=None if tail_outputs is None else tail_outputs.get("attentions"),
            **{CACHE_ARGUMENT: None if use_cache is False else cache},
        )

    def _read_output_settings(self, use_cache: bool | None, kwargs: dict[str, Any]) -> bool | None:
        """Apply what the configuration says about outputs, where the caller says nothing.

        Args:
            use_cache: The caller's.
            kwargs: The caller's other arguments; `output_hidden_states` and `output_attentions` are added.

        Returns:
            Whether to return the cache; `None`: the receiver's default.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name, False):
                kwargs.setdefault(name, True)
        if use_cache is None:
            # Only some configurations have this field.
            use_cache = getattr(self.config, "use_cache", None)
        return getattr(self.config.get_text_config(), "use_cache", None) if use_cache is None else use_cache

    def _collect_memory_inputs(
        self, inputs: ReceiverInputs, given: GivenSharerInputs, cache: Cache | None, use_cache: bool | None
    ) -> tuple[ReceiverInputs, list[SharerInputs], Cache | None]:
        """Collect the sharers' inputs in memory mode; with fusion off, mask the slots of the receiver's instead.

        Returns:
            The receiver's inputs, the sharers', and the cache, which keeps those slots masked for later tokens.
        """
        if given.input_ids is None or self.fusion_enabled:
            return inputs, collect_memory_inputs(self.config, inputs, given, cache), cache
        past_length = cached_length(cache)
        alignments = [
            new_alignment(alignment, inputs.batch_size, inputs.seq_len, past_length)
            for alignment in tensor_per_sharer(self.config, "sharer_alignment", given.alignment)
        ]
        slots = slot_positions(alignments)
        if not bool(slots.any()):
            return inputs, [], cache
        mask = inputs.whole_mask(past_length)
        slots = nn.functional.pad(slots, (mask.shape[1] - slots.shape[1], 0))
        mask = mask.masked_fill(slots.to(mask.device), 0)
        if cache is None and use_cache is not False:
            cache = C2CCache(DynamicCache(config=self.receiver.config.get_text_config()))
        if isinstance(cache, C2CCache):
            cache.hide(slots)
        elif cache is not None:
            raise ValueError(
                f"`{CACHE_ARGUMENT}` must be a `C2CCache`, which keeps slots masked for later tokens, where fusion is "
                f"off and the prompt has slots, but got {type(cache).__name__}; wrap it: `C2CCache(cache)`."
            )
        check_padding("receiver", self.receiver, mask)
        return replace(inputs, attention_mask=mask, position_ids=None).with_positions(), [], cache

    def _check_no_checkpointing(self) -> None:
        """Refuse base models whose layers drop the cache, as gradient checkpointing does in training mode.

        Raises:
            ValueError: There is one.
        """
        for role, model in (("receiver", self.receiver), *(("sharers", sharer) for sharer in self.sharers)):
            if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                raise ValueError(
                    f"`{role}`: gradient checkpointing of a base model in training mode drops its cache; call "
                    "`model.gradient_checkpointing_enable()` of the C2C model, and leave base models in `eval()`."
                )

    def _plan_fusion(
        self,
        sharers: list[SharerInputs],
        inputs: ReceiverInputs,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
    ) -> FusionPlan | None:
        starts = None
        if self.config.fuse_response:
            # Requested logits must come from the fused pass, also those of assisted decoding's candidate tokens.
            starts = last_prompt_positions(inputs.attention_mask, labels, inputs.tokens)
            if isinstance(logits_to_keep, int) and logits_to_keep:
                starts = starts.clamp_max(max(0, inputs.seq_len - logits_to_keep))
        return plan_fusion([sharer.alignment for sharer in sharers], [sharer.length for sharer in sharers], starts)

    def _plan_memory_slots(
        self, sharers: list[SharerInputs], inputs: ReceiverInputs, cache: Cache | None, num_kept: int
    ) -> MemoryPlan | None:
        past_length = cached_length(cache)
        plan = plan_memory_slots(
            [sharer.alignment for sharer in sharers],
            inputs.new_mask().bool(),
            [sharer.length for sharer in sharers],
            min(num_kept, inputs.seq_len),
            past_length > 0,
        )
        if plan is not None:
            check_length("receiver", self.receiver, past_length + inputs.seq_len)
        return plan

    def _prefill_models(
        self,
        prefill_receiver: Callable[[], ReceiverPrefill],
        sharers: list[SharerInputs],
        lengths: Sequence[int],
        cache: Cache,
    ) -> tuple[ReceiverPrefill, list[SharerCache | None]]:
        """Prefill every sharer as far as `lengths` says, and the receiver.

        A [`C2CCache`] keeps the sharers' caches, which are continued if the new text extends the cached one.

        Returns:
            The receiver's result, and each sharer's cache; `None` for one that has no aligned tokens in any turn.
        """
        kept = cache.sharer_caches if isinstance(cache, C2CCache) else []
        caches = [
            sharer.cache or earlier for sharer, earlier in zip(sharers, kept or [None] * len(sharers), strict=True)
        ]
        calls: dict[int, Callable[[], SharerCache]] = {}
        for index, (sharer, length) in enumerate(zip(sharers, lengths, strict=True)):
            length = sharer.length if self.config.fuse_response else length
            if sharer.cache is None and length > 0:
                check_length("sharers", self.sharers[index], length)
                positions = None if sharer.position_ids is None else sharer.position_ids[:, :length]
                tokens = (sharer.input_ids[:, :length], sharer.attention_mask[:, :length], positions)
                calls[index] = partial(prefill_sharer, self.sharers[index], *tokens, caches[index])
        models = [self.receiver, *(self.sharers[index] for index in calls)]
        own, prefilled = run_concurrently(prefill_receiver, list(calls.values()), models, sharers[0].alignment.numel())
        for index, sharer_cache in zip(calls, prefilled, strict=True):
            caches[index] = sharer_cache
        if isinstance(cache, C2CCache):
            cache.sharer_caches = list(caches)
        return own, caches

    def _prefill_fused_region(
        self, plan: FusionPlan, inputs: ReceiverInputs, cache: Cache, first_kept: int
    ) -> ReceiverPrefill:
        """Run the receiver over the region that is fused.

        The fused states of the caller's cache stay as they are; with response fusion its `unfused_cache` grows.

        Returns:
            Its own states there, which fusion may change in place, and the requested logits.
        """
        past_length = cached_length(cache)
        check_length("receiver", self.receiver, past_length + plan.end)
        region, needs_grad = inputs.columns(0, plan.end), trains(self.receiver)
        num_logits = plan.end - first_kept if int(plan.row_starts.max()) > first_kept else 0
        run = partial(
            prefill,
            self.receiver,
            input_ids=region.input_ids,
            attention_mask=region.attention_mask,
            position_ids=region.position_ids,
            inputs_embeds=region.inputs_embeds,
            logits_to_keep=num_logits,
            with_gradient=needs_grad,
        )
        if self.config.fuse_response and isinstance(cache, C2CCache):
            if past_length != cached_length(cache.unfused_cache):
                raise ValueError(
                    "`cache`: with `fuse_response=True` a cache can only be continued if it was filled with response "
                    "fusion from the start, but this one was not; start with an empty one."
                )
            logits = run(cache=cache.keep_unfused())
            states = cached_states(cache.keep_unfused())
            return [(k[:, :, past_length:].clone(), v[:, :, past_length:].clone()) for k, v in states], logits
        if past_length == 0:
            scratch = full_length_cache()
            logits = run(cache=scratch)
            states = cached_states(scratch)
            # Autograd keeps the states that attention used, and fusion changes them in place.
            return [(keys.clone(), values.clone()) for keys, values in states] if needs_grad else states, logits
        recording = RecordingCache(cache.receiver_cache if isinstance(cache, C2CCache) else cache)
        logits = run(cache=recording)
        return recording.recorded, logits

    def _prefill_unfused(self, inputs: ReceiverInputs, cache: C2CCache) -> None:
        """Keep the receiver's own states of tokens without counterpart, on which response fusion goes on later."""
        if cached_length(cache) == cached_length(cache.unfused_cache):
            prefill(
                self.receiver,
                cache.keep_unfused(),
                inputs.input_ids,
                inputs.attention_mask,
                inputs.position_ids,
                inputs_embeds=inputs.inputs_embeds,
            )

    def _prefill_leading_tokens(self, plan: MemoryPlan, inputs: ReceiverInputs) -> ReceiverPrefill:
        """Run the receiver over its tokens before the slots, see [`prefill_leading_tokens`]."""
        return prefill_leading_tokens(plan, self.receiver, inputs, trains(self.receiver)), None

    def rotations(self) -> list[list[Rotation]]:
        """Return the rotary embedding of every layer's keys: the receiver's, then each sharer's.

        Measured once on the models.

        Raises:
            ValueError: The keys of a model are rotated in an unknown way, or a sharer is not loaded and its rotations
                are not recorded.
        """
        if self._rotations is None:
            rotations = [layer_rotations(self.receiver, "receiver")]
            for sharer, recorded in zip(self.sharers, self.config.sharers, strict=True):
                if not isinstance(sharer, AbsentSharer):
                    rotations.append(layer_rotations(sharer, "sharers"))
                elif recorded.rotations is not None:
                    rotations.append(read_rotations(recorded.rotations))
                else:
                    raise ValueError(
                        "`load_sharers=False` needs a fuser that records the rotations of the sharers' keys, which "
                        "this one does not; load it with its sharers and save it again."
                    )
            self._rotations = rotations
        return self._rotations

    def check_processor(self, settings: Sequence[PairSettings] | PerSharer | None) -> None:
        """Compare the settings of a processor with those of this model.

        Args:
            settings: `C2CProcessor.settings`, or `sharer_settings` of its outputs. `None`: not compared.

        Raises:
            ValueError: They differ.
        """
        if settings is None:
            return
        values = [settings] if isinstance(settings, torch.Tensor) else settings
        found = [value if isinstance(value, PairSettings) else PairSettings.from_tensor(value) for value in values]
        check_settings(settings_of_config(self.config), found)

    @property
    def token_tables(self) -> list[torch.Tensor | None]:
        """Per sharer the lookup table of the `"first"` and `"longest"` alignments, else `None`."""
        return [getattr(self, f"token_table_{index}") for index in range(self.config.num_sharers)]

    @property
    def fusion_enabled(self) -> bool:
        """Whether fusion is on in the current context, see [`disable_fusion`]."""
        # torch.compile traces a number, but no context variable.
        return self._num_disabling_contexts == 0 or id(self) not in _fusion_disabled.get()

    @contextmanager
    def disable_fusion(self) -> Iterator["C2CForCausalLM"]:
        """Switch fusion off: within this context every output equals the receiver's own.

        Other threads and asynchronous tasks are not affected.
        """
        token = _fusion_disabled.set(_fusion_disabled.get() | {id(self)})
        with _count_lock:
            self._num_disabling_contexts += 1
        try:
            yield self
        finally:
            with _count_lock:
                self._num_disabling_contexts -= 1
            _fusion_disabled.reset(token)

    # ------------------------------------------------------------------ generation

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step of `generate` as the receiver does; sharer inputs go into the prefill only."""
        sharer_inputs = {name: kwargs.pop(name) for name in SHARER_ARGUMENTS if name in kwargs}
        is_prefill = is_first_iteration or not kwargs.get("use_cache", True)
        # Without the cache, the receiver leaves the mask two-dimensional, which the prefills and a `C2CCache` need.
        keeps_mask = is_prefill or (self.fusion_enabled and self.config.fuse_response)
        cache = pop_cache(kwargs) if keeps_mask else None
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        inputs = self.receiver.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if keeps_mask:
            inputs[CACHE_ARGUMENT] = cache
            if is_prefill and self.fusion_enabled:
                inputs.update(sharer_inputs)
                if sharer_inputs.get("sharer_alignment") is not None:
                    # Without a cache the text has grown; assisted decoding appends its candidates.
                    length = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
                    inputs["sharer_alignment"] = [
                        nn.functional.pad(alignment, (0, max(0, length - alignment.shape[1])), value=-1)
                        for alignment in tensor_per_sharer(
                            self.config, "sharer_alignment", sharer_inputs["sharer_alignment"]
                        )
                    ]
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with every mode and argument but `prefill_chunk_size`.

        The sharer arguments are those of [`forward`]. They may be left out with `token_alignment` `"identity"`,
        `"first"` or `"longest"`.

        Raises:
            ValueError: With `prefill_chunk_size`: a chunk would attend to the fused states of the one before it.
        """
        self.check_processor(kwargs.pop("sharer_settings", None))
        embeds, model_inputs = kwargs.pop("sharer_inputs_embeds", None), kwargs.pop("sharer_model_inputs", None)
        if self.fusion_enabled and (embeds is not None or model_inputs is not None):
            # As caches, which beams repeat, and which the prefill of the prompt takes.
            names = ("sharer_input_ids", "sharer_attention_mask", "sharer_position_ids", "sharer_caches")
            ids, masks, positions, caches = (kwargs.get(name) for name in names)
            given = GivenSharerInputs(ids, masks, None, positions, caches)
            given = prefill_given_inputs(self.config, list(self.sharers), given, embeds, model_inputs)
            kwargs |= {"sharer_input_ids": given.input_ids, "sharer_attention_mask": given.attention_mask}
            kwargs["sharer_caches"] = given.caches
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        if self.fusion_enabled and chunk_size is not None:
            raise ValueError(
                f"`prefill_chunk_size` must be None, but got {chunk_size}: fusion needs the prompt in one prefill."
            )
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        input_ids = next(
            (ids for ids in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if ids is not None), None
        )
        self._check_text(input_ids, kwargs, cache)
        if not isinstance(cache, C2CCache):
            return super().generate(*args, **kwargs)
        output = super().generate(*args, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if (
            input_ids is not None
            and len(sequences) == len(input_ids)
            and kwargs.get("num_beams", config.num_beams) in (None, 1)
        ):
            cache.complete_text(sequences)
        return output

    def _check_text(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any], cache: Cache | None) -> None:
        """Compare the lengths of the inputs of `generate` and the cached text, and mask slots where fusion is off.

        Args:
            input_ids: `(batch_size, seq_len)`, or `None` with `inputs_embeds`.
            kwargs: Of `generate`; the attention mask is changed.
            cache: The given cache.

        Raises:
            ValueError: The alignment is that of a text of another length, or the cache that of another text.
        """
        tokens, mask = kwargs.get("inputs_embeds") if input_ids is None else input_ids, kwargs.get("attention_mask")
        if tokens is None:
            return
        # A four-dimensional mask does not say where the padding is.
        padding = torch.ones(tokens.shape[:2]) if mask is None or mask.dim() != 2 else mask
        alignments: list[torch.Tensor] | None = None
        slots = None
        if kwargs.get("sharer_alignment") is not None:
            alignments = [
                new_alignment(alignment, len(tokens), tokens.shape[1], 0, padding)
                for alignment in tensor_per_sharer(self.config, "sharer_alignment", kwargs["sharer_alignment"])
            ]
            slots = slot_positions(alignments)
        # A mask that is longer than the ids covers the cached text, which they continue.
        if isinstance(cache, C2CCache) and input_ids is not None and padding.shape[1] == tokens.shape[1]:
            self._crop_to_text(cache, input_ids, padding, alignments, kwargs)
        if self.config.mode == "memory" and not self.fusion_enabled and slots is not None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device) if mask is None else mask
            kwargs["attention_mask"] = mask.masked_fill(slots.to(mask.device), 0)
            if isinstance(cache, C2CCache):
                cache.hide(slots)
        if isinstance(cache, C2CCache) and cache.hidden_positions is not None:
            mask = kwargs.get("attention_mask")
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device) if mask is None else mask
            kwargs["attention_mask"] = cache.masked(mask)

    def _crop_to_text(
        self,
        cache: C2CCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        alignments: list[torch.Tensor] | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Drop what a kept cache holds of another text, or of other states of the sharers, than the given ones."""
        if not self.fusion_enabled:
            alignments = [torch.full_like(input_ids, -1) for _ in self.sharers]
        elif self.config.fuse_response:
            # There the sharers' tokens are made from the receiver's.
            alignments = None
        ids, masks, _, _ = (kwargs.get(name) for name in _SHARER_TENSORS)
        texts = None
        if alignments is not None and ids is not None:
            sharers = sharer_inputs_from_caller(self.config, GivenSharerInputs(ids, masks), len(input_ids))
            texts = [(sharer.input_ids, sharer.attention_mask) for sharer in sharers]
        cache.crop_to_text(input_ids, attention_mask, alignments, texts, self.config.mode == "memory")

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        # The first hook that sees both ids and mask: from here on the prompt's end must be known, because assisted
        # decoding appends its candidates before the prefill.
        if self.fusion_enabled and self.config.mode != "memory" and input_ids is not None:
            self._complete_sharer_inputs(input_ids, model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if model_kwargs.get("sharer_caches") is not None:
            caches = cache_per_sharer(model_kwargs["sharer_caches"], self.config.num_sharers)
            model_kwargs["sharer_caches"] = caches
        for name in SHARER_ARGUMENTS:
            if isinstance(model_kwargs.get(name), list | tuple):
                # A cache of one row serves any batch.
                model_kwargs[name] = [
                    value
                    if value is None or (isinstance(value, SharerCache) and len(value.input_ids) == 1)
                    else value.repeat_interleave(expand_size, dim=0)
                    for value in model_kwargs[name]
                ]
        return input_ids, model_kwargs

    def _complete_sharer_inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Write the sharer inputs that the caller left out into `model_kwargs`."""
        ids, masks, alignment, positions = (model_kwargs.get(name) for name in _SHARER_TENSORS)
        # Response fusion makes the sharers' tokens one by one, those of the answer, too.
        if self.config.fuse_response or (ids is not None and alignment is not None):
            return
        mask = model_kwargs.get("attention_mask")
        if ids is None:
            tokens = input_ids if model_kwargs.get("inputs_embeds") is None else None
            inputs = ReceiverInputs(tokens, None, mask, model_kwargs.get("position_ids"))
            sharers = sharer_inputs_from_tokens(self.config, self.token_tables, inputs)
            model_kwargs["sharer_input_ids"] = [sharer.input_ids for sharer in sharers]
            model_kwargs["sharer_attention_mask"] = [sharer.attention_mask for sharer in sharers]
            if all(sharer.position_ids is not None for sharer in sharers):
                model_kwargs["sharer_position_ids"] = [sharer.position_ids for sharer in sharers]
        else:
            given = GivenSharerInputs(ids, masks, None, positions)
            sharers = sharer_inputs_from_caller(self.config, given, input_ids.shape[0])
        if alignment is None:
            ends = last_prompt_positions(mask, None, input_ids)
            model_kwargs["sharer_alignment"] = [
                default_alignment(sharer.alignment, mask, ends, 0, input_ids.shape[1]) for sharer in sharers
            ]

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # The assistant is a plain model without sharer inputs.
        plain = {name: value for name, value in model_kwargs.items() if name not in SHARER_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=plain, **kwargs)

    # ------------------------------------------------------------------ building and loading

    @classmethod
    def from_receiver_and_sharers(
        cls,
        receiver: BaseModel,
        sharers: BaseModel | Sequence[BaseModel],
        receiver_kwargs: dict[str, Any] | None = None,
        sharer_kwargs: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        token_alignment: str | Sequence[str | None] | None = None,
        **config_fields: Any,
    ) -> "C2CForCausalLM":
        """Build a model with an untrained fuser; in fusion mode its output equals the receiver's.

        Args:
            receiver: Hub id, folder or loaded model, also PEFT's: an adapter is saved beside the fuser.
            sharers: One of these, or a list.
            receiver_kwargs: Arguments of the receiver's own `from_pretrained`. `gguf_file` and `quantization_config`
                are recorded and used again.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            token_alignment: See [`SharerConfig`]; one for all, or one per sharer. `None`: `"identity"` between equal
                vocabularies, else `"span"`.
            **config_fields: Fields of [`C2CConfig`], and those of [`SharerConfig`] that are not measured on the
                models, with one value for all sharers or one per sharer.

        Raises:
            ValueError: For models or values that do not go together.
        """
        C2CConfig.check_names(config_fields, by_user=True)
        bases = _as_list(sharers)
        if not bases:
            raise ValueError("`sharers` must name at least one model, but the list is empty.")
        all_kwargs = [receiver_kwargs or {}, *kwargs_per_sharer(sharer_kwargs, len(bases))]
        roles = ["receiver", *["sharers"] * len(bases)]
        loaded = [
            load_base_model(base, role, kwargs)
            for base, role, kwargs in zip([receiver, *bases], roles, all_kwargs, strict=True)
        ]
        models = [model for model, _, _ in loaded]
        tokenizers = [find_tokenizer(name, kwargs) for (_, name, _), kwargs in zip(loaded, all_kwargs, strict=True)]
        if config_fields.get("mode") == "memory":
            token_alignment = token_alignment or "span"
        alignments = resolve_alignments(
            token_alignment, tokenizers, [model.get_input_embeddings().weight.shape[0] for model in models]
        )
        records = [
            {
                "name_or_path": name,
                "revision": revision,
                "gguf_file": kwargs.get("gguf_file") if isinstance(base, str | Path) else None,
                "config": model.config,
                "fingerprint": fingerprint(model),
                "tokenizer_hash": None if tokenizer is None else tokenizer_hash(tokenizer),
            }
            for base, (model, name, revision), tokenizer, kwargs in zip(
                [receiver, *bases], loaded, tokenizers, all_kwargs, strict=True
            )
        ]
        own, *others = records
        config = C2CConfig(
            **{f"receiver_{field}": value for field, value in own.items()},
            sharers=[
                SharerConfig(**record, token_alignment=alignment, has_adapter=has_adapter(sharer))
                for record, alignment, sharer in zip(others, alignments, models[1:], strict=True)
            ],
        )
        config.override(config_fields)
        model = cls(config, models[0], models[1:])
        for index, alignment in enumerate(alignments):
            if alignment in ("first", "longest"):
                model.set_token_table(index, tokenizers[0], tokenizers[index + 1])
        return model.eval()

    def set_token_table(
        self,
        sharer_index: int,
        receiver_tokenizer: PreTrainedTokenizerBase | None,
        sharer_tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
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
        state_dict: dict[str, torch.Tensor] | None = None,
        use_safetensors: bool | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> "C2CForCausalLM":
        """Load a saved fuser together with its base models.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the fuser.
            config: Used in place of the saved configuration.
            receiver: A loaded receiver, or another place of the same; `None`: by the recorded name and revision.
            sharers: The same for the sharers.
            receiver_kwargs: Arguments of the receiver's own `from_pretrained`.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            dtype: Precision of the base models; the fuser stays in float32 and computes in the receiver's. For
                inference alone, `model.fuser.to(dtype)` saves a second copy of its weights and changes no result.
            device_map: Placement of each base model.
            attn_implementation: Attention of the base models, such as `"flash_attention_2"`.
            verify_base_models: Compare the base models' weights and revisions with those recorded; of quantized ones,
                whose weights cannot be compared, the vocabularies.
            load_sharers: `False`: load no sharer; pass `sharer_caches` to `forward` or `generate`.
            state_dict: Weights of the fuser in place of the saved ones; those of base models are left out.
            use_safetensors: `True`: base models, too, are loaded from safetensors only, as the fuser always is.
            output_loading_info: Return the model and a dictionary of missing, unexpected and mismatched weights. They
                are empty, since a checkpoint that does not fit is refused.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder` say where the
                fuser is on the Hub; `quantization_config`, `max_memory`, `offload_folder`, `offload_buffers` and
                `tqdm_class` go to every base model; fields of [`C2CConfig`] and [`SharerConfig`] override the saved
                ones.

        Raises:
            ValueError: The checkpoint or the base models do not fit, or an argument has no meaning here.
            OSError: A file is missing.
        """
        name = str(pretrained_model_name_or_path)
        hub_kwargs = {key: value for key in HUB_KWARGS if (value := kwargs.pop(key, None)) is not None}
        for key in _IGNORED_ARGUMENTS:
            kwargs.pop(key, None)
        # lm-evaluation-harness hands some of these to every model, as None where it asks for nothing.
        shared_kwargs = {key: kwargs.pop(key) for key in _BASE_MODEL_ARGUMENTS if key in kwargs}
        if kwargs.pop("gguf_file", None) is not None:
            raise ValueError(
                "`gguf_file` names a file of one base model; pass it in `receiver_kwargs` or `sharer_kwargs`."
            )
        if use_safetensors is False:
            raise ValueError(
                "`use_safetensors` must be True or None: a fuser is saved as safetensors only. For a base model, pass "
                "False in `receiver_kwargs` or `sharer_kwargs`."
            )
        check_subfolder(hub_kwargs.get("subfolder"))
        if not isinstance(config, C2CConfig):
            config = C2CConfig.from_pretrained(name, **hub_kwargs)
        if config.num_sharers == 0:
            raise ValueError(
                f"`pretrained_model_name_or_path`: {name!r} is no saved fuser: its configuration names no sharer."
            )
        legacy_dtype = kwargs.pop("torch_dtype", None)
        dtype = legacy_dtype if dtype is None else dtype
        if getattr(config.receiver_config, "_attn_implementation", None) is None:
            # The Auto classes write this argument into the configuration that they load. The configuration of a loaded
            # model is not asked: the receiver's attention need not suit the sharers.
            attn_implementation = attn_implementation or config._attn_implementation
        config.override(kwargs)
        # Configuration and weights must be those of one commit, also where the repository changes in between.
        revision = resolve_revision(name, hub_kwargs)
        hub_kwargs.update({} if revision is None else {"revision": revision})
        if state_dict is None:
            weights = load_fuser_weights(name, hub_kwargs)
        else:
            weights = {key: value for key, value in state_dict.items() if is_own_weight(key)}
        check_sizes(config, weights)
        shared_kwargs |= {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        shared_kwargs["use_safetensors"] = use_safetensors
        shared_kwargs |= {key: hub_kwargs.get(key) for key in ("token", "cache_dir", "local_files_only")}
        shared_kwargs = {key: value for key, value in shared_kwargs.items() if value is not None}
        all_kwargs = [receiver_kwargs or {}, *kwargs_per_sharer(sharer_kwargs, config.num_sharers)]
        all_kwargs = [{**shared_kwargs, **own} for own in all_kwargs]
        given_sharers = None if sharers is None else _as_list(sharers)
        loaded_receiver, loaded_sharers = load_base_models(
            config, receiver, given_sharers, all_kwargs, load_sharers, verify_base_models
        )
        model = cls(config, loaded_receiver, loaded_sharers)
        if verify_base_models:
            verify_weights(config, [loaded_receiver, *loaded_sharers], all_kwargs)
        check_fuser_weights(weights, model.own_state_dict())
        model.load_state_dict(weights, strict=False)
        load_adapter(model.receiver, name, hub_kwargs)
        for index, (sharer, sharer_config) in enumerate(zip(model.sharers, config.sharers, strict=True)):
            if sharer_config.has_adapter and isinstance(sharer, PreTrainedModel):
                load_adapter(sharer, name, hub_kwargs, SHARER_ADAPTER_FOLDER.format(index), required=True)
        model.name_or_path = config.name_or_path or name
        model.eval()
        if output_loading_info:
            # Annotated as transformers annotates it: nearly every caller wants the model.
            info: dict[str, Any] = {
                "missing_keys": set(),
                "unexpected_keys": set(),
                "mismatched_keys": set(),
                "error_msgs": [],
            }
            return cast("C2CForCausalLM", (model, info))
        return model

    @classmethod
    def _from_config(cls, config: C2CConfig, **kwargs: Any) -> "C2CForCausalLM":
        """Build a model with random weights, its base models in the asked-for precision and attention.

        Args:
            config: Left as it is.
            **kwargs: `dtype` and `attn_implementation`, of all models.
        """
        config = copy.deepcopy(config)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        for base_config in (config.receiver_config, *(sharer.config for sharer in config.sharers)):
            if isinstance(base_config, PreTrainedConfig):
                if dtype is not None:
                    base_config.dtype = dtype
                if kwargs.get("attn_implementation") is not None:
                    base_config._attn_implementation = kwargs["attn_implementation"]
        return super()._from_config(config, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Let the fusers recompute hidden states in the backward pass; base models are frozen and stay as they are.

        Checkpointed layers of a base model would drop its cache.
        """
        for module in self.fuser.modules():
            if isinstance(module, FuserGroup):
                module.gradient_checkpointing = enable

    def enable_input_require_grads(self) -> None:
        """Do nothing: the fusers' weights need no gradients of the receiver's embeddings."""

    def init_weights(self) -> None:
        """Leave all weights as they are: base models are initialized, fusers initialize themselves."""

    def train(self, mode: bool = True) -> "C2CForCausalLM":
        """Set the mode of the fuser and of an adapter's dropout; base models stay in evaluation mode."""
        super().train(mode)
        set_adapter_mode(self.receiver.eval(), mode)
        self.sharers.eval()
        return self

    @property
    def peft_config(self) -> "dict[str, PeftConfig]":
        """The receiver's PEFT adapter, as on any model of transformers; setting it takes PEFT layers off the others.

        PEFT sets it when it has put a new adapter into all modules of the target names, those of the sharers and the
        fuser among them, as `get_peft_model(c2c_model, config)` does: the receiver alone keeps it.

        Raises:
            AttributeError: There is none.
            ValueError: The receiver has no such module, or a sharer has an adapter of its own.
        """
        return self.receiver.peft_config

    @peft_config.setter
    def peft_config(self, value: "dict[str, PeftConfig]") -> None:
        if any(has_adapter(sharer) for sharer in self.sharers if isinstance(sharer, PreTrainedModel)):
            raise ValueError(
                "`get_peft_model` changes the adapter that a sharer has; build the model anew, and put the receiver's "
                "adapter into `model.receiver` by `get_peft_model`, or train it by `C2CTrainer(peft_config=...)`."
            )
        remove_adapter(self.sharers)
        remove_adapter(self.fuser)
        self.receiver.peft_config = value

    def get_input_embeddings(self) -> nn.Module:
        """Return the receiver's input embeddings."""
        return self.receiver.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the receiver's input embeddings; lookup tables get as many entries, new ones without counterpart."""
        self.receiver.set_input_embeddings(value)
        self._resize_token_tables()

    def get_output_embeddings(self) -> nn.Module:
        """Return the receiver's output embeddings."""
        return self.receiver.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the receiver's output embeddings."""
        self.receiver.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the receiver's embeddings, as its own method does, and what depends on its vocabulary.

        With `token_alignment="identity"` the sharer's are resized as well, since it gets the same ids. In a lookup
        table new tokens have no counterpart before [`set_token_table`] is called again. Saved folders hold no
        embeddings: save the resized base models by themselves.

        Args:
            new_num_tokens: The new number. `None`: as it is.
            pad_to_multiple_of: Round up to a multiple.
            mean_resizing: How new rows are initialized, see transformers.

        Returns:
            The receiver's input embeddings.
        """
        same_ids = [
            sharer
            for sharer, alignment in zip(self.sharers, self.config.token_alignments, strict=True)
            if alignment == "identity" and isinstance(sharer, PreTrainedModel)
        ]
        for model in (self.receiver, *same_ids):
            parameters = dict(model.named_parameters())
            model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            for name, parameter in model.named_parameters():
                # New parameters are as frozen as those in whose place they are.
                parameter.requires_grad_(name in parameters and parameters[name].requires_grad)
        self._resize_token_tables()
        return self.get_input_embeddings()

    def _resize_token_tables(self) -> None:
        size = self.receiver.get_input_embeddings().weight.shape[0]
        for index, table in enumerate(self.token_tables):
            if table is not None and len(table) != size:
                rest = table.new_full((max(0, size - len(table)),), -1)
                setattr(self, f"token_table_{index}", torch.cat([table[:size], rest]))
        recorded = [self.config.receiver_config, *(sharer.config for sharer in self.config.sharers)]
        for model, config in zip([self.receiver, *self.sharers], recorded, strict=True):
            if isinstance(model, PreTrainedModel) and isinstance(config, PreTrainedConfig):
                config.get_text_config().vocab_size = model.config.get_text_config().vocab_size

    # ------------------------------------------------------------------ saving and publishing

    def own_state_dict(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return the weights that are saved: those of the fuser, and the token tables.

        Args:
            state_dict: The model's, from which they are taken. `None`: as they are.
        """
        # The base models are not asked: quantized ones may change their weights when they are.
        tables = {f"token_table_{index}": table for index, table in enumerate(self.token_tables) if table is not None}
        own = {**fuser_state_dict(self.fuser), **tables}
        return own if state_dict is None else {name: value for name, value in state_dict.items() if name in own}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        is_main_process: bool = True,
        with_code: bool = False,
        int8: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save configuration and fuser, never a base model's weight; PEFT adapters of base models, if there are any.

        The files are written to a staging folder first and moved to their places when all are complete, so that an
        interrupted save leaves the earlier files as they were.

        Args:
            save_directory: The folder; made if needed.
            state_dict: Weights to save in place of the model's own; those of base models are left out.
            push_to_hub: Upload afterwards, see [`push_to_hub`].
            is_main_process: Only the main process writes.
            with_code: Save short code files beside them, so that `AutoModelForCausalLM.from_pretrained(...,
                trust_remote_code=True)` finds the classes of the installed package without `import c2c_hf`.
            int8: Round the fuser's matrices to 8 bits, one scale per row: a quarter of the size, for publication.
                They are float32 again when loaded.
            **kwargs: Arguments of transformers' `save_pretrained`, such as `max_shard_size`; with `push_to_hub` those
                of [`push_to_hub`] as well.

        Raises:
            ValueError: `save_directory` is a file.
            OSError: The disk is full.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, but {str(target)!r} is a file.")
        push_kwargs = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs}
        if not is_main_process:
            return
        if self.config.needs_rotations and not any(isinstance(sharer, AbsentSharer) for sharer in self.sharers):
            # A model that is loaded without its sharers cannot measure them.
            for sharer_config, rotations in zip(self.config.sharers, self.rotations()[1:], strict=True):
                sharer_config.rotations = describe_rotations(rotations)
        weights = self.own_state_dict(state_dict)
        with staged_folder(target, replaces=_is_saved_weight, last=CONFIG_NAME) as staging:
            try:
                super().save_pretrained(staging, state_dict=quantize(weights) if int8 else weights, **kwargs)
            except SafetensorError as error:
                # What safetensors raises where the disk is full.
                raise OSError(f"The fuser could not be written ({error}); the earlier files are unchanged.") from error
            write_code(staging, CONFIG_NAME, with_code)
            save_adapter(self.receiver, staging / ADAPTER_FOLDER)
            for index, sharer in enumerate(self.sharers):
                save_adapter(sharer, staging / SHARER_ADAPTER_FOLDER.format(index))
        if push_to_hub:
            repo_id = push_kwargs.pop("repo_id", target.resolve().name)
            size = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.push_to_hub(repo_id, with_code=with_code, int8=int8, **size, **push_kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModelForCausalLM") -> None:
        """Do nothing: this class is installed, so that its code is not copied into saved folders.

        transformers calls this on every class that it loads by `trust_remote_code=True`.
        """

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: C2CProcessor | None = None,
        tags: Sequence[str] | str | None = None,
        with_code: bool = False,
        int8: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> CommitInfo:
        """Publish configuration, fuser, processor and model card in one commit; never a base model's weight.

        Args:
            repo_id: `name` or `owner/name`; made if needed.
            processor: Of the pair. `None`: made from the base models' names, as
                [`C2CProcessor.from_receiver_and_sharers`] does.
            tags: Further tags of the card.
            with_code: See [`save_pretrained`].
            int8: See there.
            max_shard_size: Largest size of a weights file.
            **kwargs: `receiver` and `sharers`, Hub ids to record in place of local folders; `card`, or what one is
                made of: `license`, `evaluation`, `training`, `datasets`; where it goes: `subfolder`, `private`,
                `token`, `revision` (a branch), `create_pr`, `commit_message`, `commit_description`. See
                [`~hub.publish_fuser`].

        Returns:
            The commit.

        Raises:
            ValueError: A base model is a local folder, the license is unknown, or an argument is.
            OSError: The Hub refuses (`HfHubHTTPError`) or the disk is full; nothing is committed then.
            huggingface_hub.errors.HTTPError: The Hub does not answer.
            RuntimeError: The upload of a large file fails.
        """
        if processor is None:
            names = [self.config.receiver_name_or_path, *(sharer.name_or_path for sharer in self.config.sharers)]
            if None in names:
                raise ValueError("`processor` must be given where a base model has no name to find its tokenizer by.")
            processor = C2CProcessor.from_config(self.config)
        self.check_processor(processor.settings)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, with_code=with_code, int8=int8, max_shard_size=max_shard_size)
            processor.save_pretrained(folder, with_code=with_code)
            tags = [tags] if isinstance(tags, str) else tags or ()
            return publish_fuser(folder, repo_id, tags=tags, **kwargs)


def _without_hidden_positions(inputs: ReceiverInputs, cache: C2CCache) -> ReceiverInputs:
    """Mask the hidden positions of a cache; other masks than two-dimensional ones are those of `generate`, which did.

    Args:
        inputs: The receiver's new tokens.
        cache: Its cache.
    """
    mask = inputs.whole_mask(cached_length(cache))
    if mask.dim() != 2:
        return inputs
    return replace(inputs, attention_mask=cache.masked(mask), position_ids=None).with_positions()


def _as_list(sharers: BaseModel | Sequence[BaseModel]) -> list[BaseModel]:
    several = isinstance(sharers, nn.ModuleList) or not isinstance(sharers, str | Path | nn.Module)
    return list(sharers) if several else [sharers]  # type: ignore[arg-type]


def _is_saved_weight(name: str) -> bool:
    """Return whether a file or folder of this name belongs to an earlier save of a fuser."""
    return re.fullmatch(rf"{ADAPTER_FOLDERS}|model.*\.safetensors.*", name) is not None
