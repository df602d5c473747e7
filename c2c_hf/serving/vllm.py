"""`C2CConnector`: prepared memory slots in vLLM's key/value cache, and the middleware that encodes requests for it.

The only file that imports vLLM, which imports it by `kv_connector_module_path` and `--middleware`.
"""

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from fastapi import HTTPException
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .context_prompts import ContextPrompts
from .slot_store import SlotStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# vLLM shows the messages of its own loggers.
logger = logging.getLogger("vllm.c2c_hf")

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: By which a request names a context.
_CONTEXT_FIELDS = ("context_id", "context_path")
#: Where requests with a context come.
_PATHS = ("/v1/chat/completions", "/v1/completions")
#: Fields of a chat that its template gets.
_TEMPLATE_FIELDS = ("add_generation_prompt", "continue_final_message", "documents", "tools")


@dataclass
class _Request:
    """What the scheduler knows about a request with a context.

    Attributes:
        key: Of its slots in the store.
        length: Number of tokens with prepared states.
        refused: Why it must fail. `None`: it need not.
    """

    key: str
    length: int
    refused: str | None = None


@dataclass
class _Load:
    """States to write into the engine's cache.

    Attributes:
        request_id: Whose they are.
        request: Which they are.
        start: First token to be written.
        block_ids: The blocks of the request.
    """

    request_id: str
    request: _Request
    start: int
    block_ids: list[int]


@dataclass
class C2CConnectorMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    loads: list[_Load] = field(default_factory=list)


class C2CConnector(KVConnectorBase_V1):
    """Loads prepared memory slots, and the receiver's states before them, in place of prefilling.

    The engine computes the rest of the prompt. Requests name slots as [`ContextPrompts.encode`] does; those without
    are left alone. A request whose slots are missing, damaged or those of another prompt fails by itself.

    `kv_connector_extra_config`: `slots`, the folder of the [`SlotStore`]; and for [`C2CMiddleware`] `fuser`,
    `contexts`, `sharer_tokenizer` and `max_bytes`.

    Raises:
        ValueError: The engine has something that is not supported; named by the message.
    """

    def __init__(self, vllm_config: "VllmConfig", role: "KVConnectorRole", kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _check_engine(vllm_config, kv_cache_config)
        self._slots = _slot_store(self._kv_transfer_config.kv_connector_extra_config)
        self._block_size = vllm_config.cache_config.block_size
        self._num_workers = vllm_config.parallel_config.tensor_parallel_size
        self._requests: dict[str, _Request] = {}
        self._loads: list[_Load] = []
        self._failed_blocks: set[int] = set()
        #: The attention layers of this worker, by their index in the model.
        self._layers: dict[int, Any] = {}

    # ------------------------------------------------------------------ scheduler

    def on_new_request(self, request: "Request") -> None:
        """Find the slots that a request names, and give its blocks hashes of their own."""
        params = request.kv_transfer_params or {}
        if not params.keys() & {"c2c_slots", *_CONTEXT_FIELDS}:
            return
        known = _Request(str(params.get("c2c_slots")), 0)
        ids = request.prompt_token_ids or []
        try:
            if "c2c_slots" not in params:
                raise ValueError("a request that names a context must come through C2CMiddleware or ContextPrompts")
            expected = self._slots.input_ids(known.key)
            known.length = len(expected)
            if ids[: known.length] != expected or len(ids) <= known.length:
                known.refused = "the prompt does not begin with the tokens of these slots, followed by others"
            elif request.skip_reading_prefix_cache:
                known.refused = "log-probabilities of the prompt need states of the slots' own computation"
        except (ValueError, OSError) as error:
            known.refused = str(error)
        # States of slots are none of the tokens' own: their blocks must never be found by the tokens alone. A refused
        # request shares blocks with nobody.
        salt = known.key if known.refused is None else uuid.uuid4().hex
        request.cache_salt = f"{salt}-{request.cache_salt}" if request.cache_salt else salt
        request.block_hashes.clear()
        request.update_block_hashes()
        if known.refused is not None:
            # Else the engine would not ask for states, and compute the slots.
            request.skip_reading_prefix_cache = False
        self._requests[request.request_id] = known

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens after the engine's own cached ones have prepared states."""
        known = self._requests.get(request.request_id)
        if known is None:
            return 0, False
        if known.refused is not None:
            # Blocks that could not be loaded are how a request fails; one token must be left to compute.
            return min(1, request.num_tokens - 1), False
        return max(0, known.length - num_computed_tokens), False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Note the blocks into which the workers write the states in this step."""
        known = self._requests.get(request.request_id)
        if known is not None and num_external_tokens > 0:
            start = 0 if known.refused is not None else known.length - num_external_tokens
            (block_ids,) = blocks.get_block_ids()
            self._loads.append(_Load(request.request_id, known, start, list(block_ids)))

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> C2CConnectorMetadata:
        """Hand this step's loads over to the workers."""
        loads, self._loads = self._loads, []
        return C2CConnectorMetadata(loads)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its blocks are free at once."""
        self._requests.pop(request.request_id, None)
        return False, None

    # ------------------------------------------------------------------ workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Note the layers of this worker.

        Raises:
            ValueError: Layers share their cache.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        self._layers = {extract_layer_index(name): layers[name] for name in kv_caches}
        if any(layer.kv_sharing_target_layer_name is not None for layer in self._layers.values()):
            raise ValueError("C2CConnector does not support layers that share the key/value cache of another layer.")

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Write the states of this step's new requests into the cache, before the forward pass."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, C2CConnectorMetadata)
        for load in metadata.loads:
            try:
                self._write(load)
            except (ValueError, OSError) as error:
                logger.error("Request %s fails, because its context cannot be used: %s", load.request_id, error)
                self._failed_blocks.update(load.block_ids[load.start // self._block_size :])

    def _write(self, load: _Load) -> None:
        if load.request.refused is not None:
            raise ValueError(load.request.refused)
        slots = self._slots.load(load.request.key, load.start)
        positions = torch.arange(load.start, load.request.length)
        blocks = torch.tensor(load.block_ids)[positions // self._block_size]
        slot_mapping = blocks * self._block_size + positions % self._block_size
        for index, layer in self._layers.items():
            cache = layer.kv_cache
            if index >= len(slots.layers):
                raise ValueError(f"its slots have states of {len(slots.layers)} layers, the engine's model has more")
            keys, values = (self._own_heads(states, layer) for states in slots.layers[index])
            # The backend knows the layout of its cache, which is packed on a CPU and may be quantized.
            layer.impl.do_kv_cache_update(layer, keys, values, cache, slot_mapping.to(cache.device))

    def _own_heads(self, states: torch.Tensor, layer: Any) -> torch.Tensor:
        """Pick the heads of this worker, `(num_tokens, num_key_value_heads, head_dim)`, as the layer has them."""
        # With more workers than heads, several have the same one.
        first = get_tensor_model_parallel_rank() * len(states) // self._num_workers
        own = states[first : first + layer.num_kv_heads].transpose(0, 1)
        if own.shape[1:] != (layer.num_kv_heads, layer.head_size):
            raise ValueError(
                f"its slots have {len(states)} heads of {states.shape[2]}, the engine's model {layer.num_kv_heads} "
                f"of {layer.head_size} in each of {self._num_workers} workers"
            )
        return own.to(layer.kv_cache.device, layer.dtype).contiguous()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of this step's failed requests."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: all layers are loaded before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: the engine's states are not kept."""

    def wait_for_save(self) -> None:
        """Do nothing, as in `save_kv_layer`."""


class C2CMiddleware:
    """Lets `vllm serve` answer OpenAI requests about contexts: `--middleware c2c_hf.serving.vllm.C2CMiddleware`.

    A request names a context in `kv_transfer_params`, by `context_id` or `context_path`, see
    [`ContextPrompts.encode`]; `"on_missing": "receiver"` lets the receiver answer alone where there is none, in place
    of an error. The fuser is loaded, with the receiver on the CPU, when the first one comes.

    Args:
        app: The server.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._prompts: ContextPrompts | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and scope["method"] == "POST" and path in _PATHS:
            receive = self._encoding(scope, receive)
        await self._app(scope, receive, send)

    def _encoding(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` whose body is encoded when the server asks for it, after its own checks of the key."""
        is_first = True

        async def receive_encoded() -> MutableMapping[str, Any]:
            nonlocal is_first
            if not is_first:
                return await receive()
            is_first, body, more_body = False, b"", True
            while more_body:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                body, more_body = body + message.get("body", b""), message.get("more_body", False)
            body = await asyncio.to_thread(self._encode_body, scope["app"].state.vllm_config, body)
            return {"type": "http.request", "body": body, "more_body": False}

        return receive_encoded

    def _encode_body(self, vllm_config: "VllmConfig", body: bytes) -> bytes:
        """Replace the name of a context by the tokens of the prompt and the key of the slots.

        Raises:
            HTTPException: The context cannot be used; the server makes it an error as OpenAI's are.
        """
        try:
            request = json.loads(body)
        except ValueError:
            # The server says what is wrong with it.
            return body
        params = request.get("kv_transfer_params") if isinstance(request, dict) else None
        if not isinstance(params, dict) or not params.keys() & set(_CONTEXT_FIELDS):
            return body
        on_missing = params.get("on_missing", "error")
        if on_missing not in ("error", "receiver"):
            raise HTTPException(400, f"`on_missing` must be 'error' or 'receiver', but got {on_missing!r:.60}.")
        if request.get("use_beam_search"):
            # Its beams are requests of their own, without `kv_transfer_params`.
            raise HTTPException(400, "`use_beam_search` is not supported in a request with a context.")
        prompts = self._load_prompts(vllm_config)
        name = {field: str(params[field]) for field in _CONTEXT_FIELDS if params.get(field) is not None}
        try:
            if "messages" in request:
                template_kwargs = dict(request.get("chat_template_kwargs") or {})
                template_kwargs |= {field: request[field] for field in _TEMPLATE_FIELDS if field in request}
                encoded = prompts.encode(request["messages"], **name, **template_kwargs)
                # Tokenized once, here: the server takes these ids in place of the messages.
                params = {**encoded.kv_transfer_params, "prompt_token_ids": encoded.prompt_token_ids}
                request["kv_transfer_params"] = params
            else:
                if not isinstance(request.get("prompt"), str):
                    raise ValueError("`prompt` must be one string in a request with a context.")
                encoded = prompts.encode(request["prompt"], **name)
                request |= {"prompt": encoded.prompt_token_ids, "kv_transfer_params": encoded.kv_transfer_params}
        except FileNotFoundError as error:
            if on_missing != "receiver":
                raise HTTPException(404, str(error)) from error
            del request["kv_transfer_params"]
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except OSError as error:
            raise HTTPException(500, str(error)) from error
        return json.dumps(request).encode()

    def _load_prompts(self, vllm_config: "VllmConfig") -> ContextPrompts:
        with self._lock:
            if self._prompts is None:
                config, model = vllm_config.kv_transfer_config, vllm_config.model_config
                if config is None or not {"fuser", "contexts"} <= config.kv_connector_extra_config.keys():
                    raise HTTPException(500, "`kv_connector_extra_config` must name `fuser`, `contexts` and `slots`.")
                extra = config.kv_connector_extra_config
                try:
                    self._prompts = ContextPrompts.from_pretrained(
                        extra["fuser"],
                        extra["contexts"],
                        _slot_store(extra),
                        receiver=model.model,
                        sharer_tokenizer=extra.get("sharer_tokenizer"),
                        dtype=model.dtype,
                    )
                except (ValueError, OSError) as error:
                    raise HTTPException(500, str(error)) from error
            return self._prompts


def _slot_store(extra_config: dict[str, Any]) -> SlotStore:
    if "slots" not in extra_config:
        raise ValueError("`kv_connector_extra_config` must name `slots`, the folder of the prepared slots.")
    limit = {"max_bytes": extra_config["max_bytes"]} if "max_bytes" in extra_config else {}
    return SlotStore(extra_config["slots"], **limit)


def _check_engine(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """Refuse an engine in which slots would give wrong answers.

    Raises:
        ValueError: It has one of the features below.
    """
    parallel, groups = vllm_config.parallel_config, kv_cache_config.kv_cache_groups
    transfer = vllm_config.kv_transfer_config
    for feature, is_there in (
        ("multi-head latent attention", vllm_config.model_config.use_mla),
        (
            "layers with caches of several kinds, or that keep a window only",
            len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec,
        ),
        ("speculative decoding", vllm_config.speculative_config is not None),
        (
            "context parallelism",
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        ),
        ("kv_load_failure_policy other than 'fail'", transfer is None or transfer.kv_load_failure_policy != "fail"),
    ):
        if is_there:
            raise ValueError(f"C2CConnector does not support {feature}.")
