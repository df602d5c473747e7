"""The part of vLLM's interface that the connector uses, and a small engine that calls it as vLLM's scheduler does.

The engine keeps keys and values in blocks, finds blocks of earlier prompts by the hashes of their tokens, and runs a
receiver of transformers over what is neither cached nor loaded.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from c2c_hf._compat import CACHE_ARGUMENT

BLOCK_SIZE = 4


class HTTPException(Exception):
    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


class Connector:
    """`KVConnectorBase_V1`, as far as it does something."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_transfer_config = vllm_config, vllm_config.kv_transfer_config
        self._metadata = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    def _get_connector_metadata(self) -> Any:
        return self._metadata


class FullAttentionSpec:
    pass


class SlidingWindowSpec:
    pass


class Rank:
    """The worker that is running; a real one has a process of its own."""

    now = 0


MODULES = {
    "fastapi": {"HTTPException": HTTPException},
    "vllm": {},
    "vllm.distributed.kv_transfer.kv_connector.v1.base": {
        "KVConnectorBase_V1": Connector,
        "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
    },
    "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: Rank.now},
    "vllm.model_executor.models.utils": {
        "extract_layer_index": lambda name: next(int(part) for part in name.split(".") if part.isdigit())
    },
    "vllm.v1.kv_cache_interface": {"FullAttentionSpec": FullAttentionSpec},
}


@contextmanager
def vllm_interface() -> Iterator[ModuleType]:
    """Yield `c2c_hf.serving.vllm`, imported with the classes above in the place of vLLM's."""
    names = {name.rsplit(".", i)[0] for name in MODULES for i in range(name.count(".") + 1)}
    hidden = {name: sys.modules.pop(name, None) for name in [*names, "c2c_hf.serving.vllm"]}
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
        for field, value in MODULES.get(name, {}).items():
            setattr(sys.modules[name], field, value)
    try:
        from importlib import import_module

        yield import_module("c2c_hf.serving.vllm")
    finally:
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


class Request:
    """A request in the scheduler."""

    def __init__(self, ids: Sequence[int], params: dict[str, Any] | None = None, salt: str | None = None) -> None:
        self.request_id = f"request-{id(self)}"
        self.prompt_token_ids = list(ids)
        self.kv_transfer_params, self.cache_salt = params, salt
        self.skip_reading_prefix_cache = False
        self.output: list[int] | None = None
        self.block_hashes: list[int] = []
        self.update_block_hashes()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def update_block_hashes(self) -> None:
        for end in range((len(self.block_hashes) + 1) * BLOCK_SIZE, self.num_tokens + 1, BLOCK_SIZE):
            self.block_hashes.append(hash((self.cache_salt, *self.prompt_token_ids[:end])))


class _Layer:
    """One attention layer of a worker, whose backend writes its cache in a layout of its own."""

    kv_sharing_target_layer_name = None
    dtype = torch.float32

    def __init__(self, num_kv_heads: int, head_size: int, num_blocks: int) -> None:
        self.num_kv_heads, self.head_size, self.impl = num_kv_heads, head_size, self
        self.kv_cache = torch.full((num_blocks, num_kv_heads, 2, head_size, BLOCK_SIZE), torch.nan)

    def do_kv_cache_update(
        self, layer: "_Layer", key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        assert key.shape == value.shape == (len(slots), self.num_kv_heads, self.head_size)
        cache[slots // BLOCK_SIZE, :, 0, :, slots % BLOCK_SIZE] = key
        cache[slots // BLOCK_SIZE, :, 1, :, slots % BLOCK_SIZE] = value

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, num_kv_heads, 2, head_size)`."""
        return self.kv_cache[slots // BLOCK_SIZE, :, :, :, slots % BLOCK_SIZE]


class Engine:
    """Runs batches of requests on a receiver, one token after the other.

    Args:
        connector: The class.
        receiver: The model.
        slots: Folder of the prepared slots.
        prefix_caching: Whether blocks are found by the hashes of their tokens.
        num_workers: Tensor parallel workers.
    """

    def __init__(
        self,
        connector: type,
        receiver: PreTrainedModel,
        slots: str,
        prefix_caching: bool = True,
        num_workers: int = 1,
        num_blocks: int = 512,
    ) -> None:
        config = receiver.config
        heads = max(1, config.num_key_value_heads // num_workers)
        names = [f"model.layers.{index}.self_attn.attn" for index in range(config.num_hidden_layers)]
        self.receiver, self.prefix_caching = receiver, prefix_caching
        self.free = list(range(num_blocks))
        self.num_computed = 0
        #: Blocks by the hash of the tokens up to their end; in this engine they are never given to others.
        self.hashed: dict[int, int] = {}
        self.workers = []
        for _ in range(num_workers):
            layers = {name: _Layer(heads, config.head_dim, num_blocks) for name in names}
            worker = connector(engine_config(slots, layers, num_workers), 1, cache_config())
            worker.register_kv_caches({name: layer.kv_cache for name, layer in layers.items()})
            self.workers.append((worker, list(layers.values())))
        self.scheduler = connector(engine_config(slots, {}, num_workers), 0, cache_config())

    def __call__(self, requests: list[Request], max_new_tokens: int) -> list[list[int] | None]:
        """Answer greedily; `None` for a request that failed."""
        running = []
        for request in requests:
            self.scheduler.on_new_request(request)
        for request in requests:
            blocks = self._cached_blocks(request)
            local = len(blocks) * BLOCK_SIZE
            external, is_async = self.scheduler.get_num_new_matched_tokens(request, local)
            external = 0 if request.skip_reading_prefix_cache else external
            assert not is_async and local + external < request.num_tokens
            total = -(-(request.num_tokens + max_new_tokens) // BLOCK_SIZE)
            blocks += [self.free.pop() for _ in range(total - len(blocks))]
            found = SimpleNamespace(get_block_ids=lambda blocks=blocks: (list(blocks),))
            self.scheduler.update_state_after_alloc(request, found, external)
            new = dict(zip(request.block_hashes, blocks, strict=False)) if self.prefix_caching else {}
            self.hashed = {**new, **self.hashed}
            running.append((request, blocks, local + external))
        metadata = self.scheduler.build_connector_meta(SimpleNamespace())
        failed: set[int] = set()
        for rank, (worker, _) in enumerate(self.workers):
            Rank.now = rank
            worker.bind_connector_metadata(metadata)
            worker.start_load_kv(SimpleNamespace())
            failed |= worker.get_block_ids_with_load_errors()
        self.hashed = {value: block for value, block in self.hashed.items() if block not in failed}
        for request, blocks, computed in running:
            used = blocks[: -(-computed // BLOCK_SIZE)]
            request.output = None if failed & set(used) else self._generate(request, blocks, computed, max_new_tokens)
            self.scheduler.request_finished(request, blocks)
            kept = set(self.hashed.values())
            self.free += [block for block in blocks if block not in kept and block not in self.free]
        return [request.output for request in requests]

    def _cached_blocks(self, request: Request) -> list[int]:
        blocks: list[int] = []
        # At least the last token is computed.
        for value in request.block_hashes[: (request.num_tokens - 1) // BLOCK_SIZE]:
            if not self.prefix_caching or request.skip_reading_prefix_cache or value not in self.hashed:
                break
            blocks.append(self.hashed[value])
        return blocks

    @torch.no_grad()
    def _generate(self, request: Request, blocks: list[int], computed: int, max_new_tokens: int) -> list[int]:
        """Run the receiver from the states in the blocks on."""
        ids = list(request.prompt_token_ids)
        for _ in range(max_new_tokens):
            past = self._slots(blocks, 0, computed)
            cache = DynamicCache()
            for index in range(len(self.workers[0][1])):
                states = torch.cat([layers[index].gather(past) for _, layers in self.workers], 1)
                cache.update(states[:, :, 0].transpose(0, 1)[None], states[:, :, 1].transpose(0, 1)[None], index)
            self.num_computed += len(ids) - computed
            out = self.receiver(torch.tensor([ids[computed:]]), use_cache=True, **{CACHE_ARGUMENT: cache})
            new = self._slots(blocks, computed, len(ids))
            for index, cached in enumerate(cache.layers):
                for rank, (_, layers) in enumerate(self.workers):
                    layer, first = layers[index], rank * layers[index].num_kv_heads
                    keys, values = (
                        states[0, first : first + layer.num_kv_heads, computed:].transpose(0, 1)
                        for states in (cached.keys, cached.values)
                    )
                    layer.do_kv_cache_update(layer, keys, values, layer.kv_cache, new)
            computed = len(ids)
            ids.append(int(out.logits[0, -1].argmax()))
        return ids[request.num_tokens :]

    @staticmethod
    def _slots(blocks: list[int], start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return torch.tensor(blocks)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def engine_config(slots: str, layers: dict[str, Any], num_workers: int = 1, **extra: Any) -> SimpleNamespace:
    transfer = SimpleNamespace(
        kv_connector_extra_config={"slots": slots, **extra},
        kv_load_failure_policy="fail",
    )
    return SimpleNamespace(
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(use_mla=False),
        cache_config=SimpleNamespace(block_size=BLOCK_SIZE),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=num_workers, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def cache_config(spec: type = FullAttentionSpec, count: int = 1) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec())] * count)
