"""`ContextPrompts`: prompts about prefilled contexts, for an engine that loads prepared slots."""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import PROCESSOR_NAME

from .._compat import CACHE_ARGUMENT
from ..alignment.chat_template import Message
from ..checkpoints.download import find_file, shipped_folder
from ..checkpoints.receiver_adapter import has_adapter
from ..configuration_c2c import C2CConfig
from ..inference.fingerprints import SharerSource, fingerprint, text_hash
from ..inference.prefill import cached_states, full_length_cache
from ..inference.sharer_cache import SharerCache
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .slot_store import PreparedSlots, SlotSource, SlotStore, slot_key


class ContextPrompt(NamedTuple):
    """A prompt for an engine with the connector.

    Attributes:
        prompt_token_ids: The receiver's ids, slots included.
        kv_transfer_params: Of the request; they name the prepared slots.
    """

    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, str]


class _Context(NamedTuple):
    text: str
    hash: str
    source: SharerSource


def prefill_context(
    sharer: PreTrainedModel, processor: C2CProcessor, text: str, revision: str | None = None
) -> SharerCache:
    """Prefill a sharer with a context, for any number of prompts about it.

    Args:
        sharer: The sharer.
        processor: Of a pair with `mode="memory"` and this sharer.
        text: The context, which is kept beside the cache.
        revision: The commit from which the sharer was loaded, see [`SharerCache.prefill`].

    Raises:
        ValueError: The context is empty.
    """
    if not text.strip():
        raise ValueError("The context is empty; give a text.")
    # What stands in the prompt does not matter: the sharer sees the context only.
    inputs = processor("?", sharer_context=text).to(sharer.device)
    ids, mask = inputs["sharer_input_ids"], inputs["sharer_attention_mask"]
    return SharerCache.prefill(sharer, ids, mask, processor.sharer_tokenizers[0], revision, text)


def check_config(config: C2CConfig) -> None:
    """Refuse a fuser that needs more of an engine than states in front of a prompt.

    Raises:
        ValueError: It has another mode than memory, or several sharers.
    """
    if config.mode != "memory":
        raise ValueError(
            f"The fuser must have mode='memory', but has {config.mode!r}: it overwrites states that the engine's "
            "prefill computes, for which engines have no hook; use `model.generate`."
        )
    if config.num_sharers != 1:
        raise ValueError(
            f"The fuser must have one sharer, but has {config.num_sharers}: a context is the cache of one; use "
            "`model.generate`."
        )


def connector_config(slots: str | os.PathLike[str], **extra: Any) -> dict[str, Any]:
    """Return the `kv_transfer_config` of a vLLM engine that loads prepared slots.

    Args:
        slots: Folder of the slots.
        **extra: Further entries of `kv_connector_extra_config`, which the middleware needs.
    """
    return {
        "kv_connector": "C2CConnector",
        "kv_connector_module_path": "c2c_hf.serving.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"slots": str(slots), **extra},
    }


class ContextPrompts:
    """Encodes prompts about contexts, and prepares the slots that they need.

    A context is a file of [`SharerCache.to_safetensors`] that keeps its text, as `c2c prefill` writes it. The slots,
    and the receiver's tokens before them, are computed by the model's own forward pass, once for each context and
    beginning of a prompt.

    Args:
        model: A pair of one sharer with `mode="memory"`; the sharer need not be loaded. Its precision is the engine's.
        processor: Its processor.
        contexts: Folder of the contexts.
        slots: Where prepared slots are kept.

    Raises:
        ValueError: The model has another mode, several sharers or an adapter, or the processor is that of another one.

    Example:
        ```python
        prompts = ContextPrompts.from_pretrained("me/fuser", "contexts", SlotStore("slots"))
        prompt = prompts.encode([{"role": "user", "content": "Who wrote it?"}], context_id="report")
        ```
    """

    def __init__(
        self, model: C2CForCausalLM, processor: C2CProcessor, contexts: str | os.PathLike[str], slots: SlotStore
    ) -> None:
        config = model.config
        check_config(config)
        if has_adapter(model.receiver):
            raise ValueError(
                "The fuser must have no receiver adapter: the engine runs the receiver without it; merge it into the "
                "receiver, or use `model.generate`."
            )
        model.check_processor(processor.settings)
        self._model, self._processor = model, processor
        self._folder, self._slots = Path(contexts).resolve(), slots
        digest = hashlib.sha256(config.to_json_string().encode())
        for name, weight in sorted(model.fuser.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self._fuser_hash = digest.hexdigest()
        self._receiver = fingerprint(model.receiver) or config.receiver_fingerprint or ""
        #: Contexts whose file was checked, with its size and time.
        self._checked: dict[Path, tuple[tuple[int, int], _Context]] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        fuser: str,
        contexts: str | os.PathLike[str],
        slots: SlotStore,
        receiver: str | None = None,
        sharer_tokenizer: str | PreTrainedTokenizerBase | None = None,
        **model_kwargs: Any,
    ) -> "ContextPrompts":
        """Load a fuser with its receiver, without its sharer.

        Args:
            fuser: Folder or Hub id of a memory fuser; `"memory"`: the one that comes with the package.
            contexts: Folder of the contexts.
            slots: Where prepared slots are kept.
            receiver: Folder or Hub id of the receiver. `None`: the recorded one.
            sharer_tokenizer: Tokenizer of the sharer, or its folder or Hub id, where the fuser was saved without its
                processor. `None`: by the recorded name.
            **model_kwargs: Arguments of [`C2CForCausalLM.from_pretrained`], such as `dtype`, which must be the
                engine's.

        Raises:
            ValueError: As the constructor, or the base models do not fit.
            OSError: A file is missing.
        """
        name = str(shipped_folder(fuser) or fuser)
        model = C2CForCausalLM.from_pretrained(name, receiver=receiver, load_sharers=False, **model_kwargs)
        if find_file(name, PROCESSOR_NAME, {}) is not None and sharer_tokenizer is None:
            processor = C2CProcessor.from_pretrained(name)
        else:
            processor = C2CProcessor.from_config(model.config, receiver, sharer_tokenizer)
        return cls(model, processor, contexts, slots)

    @property
    def receiver(self) -> str:
        """Folder or Hub id of the receiver, which the engine must run."""
        return self._model.receiver.name_or_path

    def encode(
        self,
        prompt: str | Sequence[Message],
        context_id: str | None = None,
        context_path: str | None = None,
        **template_kwargs: Any,
    ) -> ContextPrompt:
        """Encode a prompt about a context, and prepare its slots if they are not in the store.

        Args:
            prompt: A text, or the messages of a chat.
            context_id: Name of a file in the folder of the contexts, without its ending.
            context_path: In place of `context_id`: path of a file in this folder.
            **template_kwargs: Arguments of the chat template, such as `add_generation_prompt`.

        Raises:
            FileNotFoundError: There is no such context.
            ValueError: Its file is damaged, of another sharer, or outside the folder; or the text is too long.
        """
        path = self._find(context_id, context_path)
        context = self._load_context(path)
        if isinstance(prompt, str):
            inputs = self._processor(prompt, sharer_context=context.text)
        else:
            chat = self._processor.apply_chat_template(prompt, sharer_context=context.text, **template_kwargs)
            inputs = cast(BatchFeature, chat)
        ids, slots = inputs["input_ids"][0], inputs["sharer_alignment"][0] >= 0
        length = int(slots.nonzero().max()) + 1
        dtype = str(self._model.receiver.dtype).removeprefix("torch.")
        sharer = context.source.fingerprint or self._model.config.sharers[0].fingerprint or ""
        source = SlotSource(sharer, context.hash, self._fuser_hash, self._receiver, dtype)
        key = slot_key(source, ids[:length])
        if key not in self._slots:
            with self._lock:
                # Another thread may have prepared them in the meantime.
                if key not in self._slots:
                    self._slots.save(self._prepare(inputs, length, path, source))
        return ContextPrompt(ids.tolist(), {"c2c_slots": key})

    def _find(self, context_id: str | None, context_path: str | None) -> Path:
        if (context_id is None) == (context_path is None):
            raise ValueError("Give either `context_id` or `context_path`.")
        name = f"{context_id}.safetensors" if context_path is None else context_path
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            raise ValueError(f"The context {name!r} is outside the folder of the contexts.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no context {context_id or context_path!r}; `c2c prefill` makes one.")
        return path

    def _load_context(self, path: Path) -> _Context:
        stat = path.stat()
        version = (stat.st_size, stat.st_mtime_ns)
        checked = self._checked.get(path)
        if checked is not None and checked[0] == version:
            return checked[1]
        cache = SharerCache.from_safetensors(path)
        if cache.text is None or len(cache.input_ids) != 1:
            raise ValueError(f"The context {path.stem!r} does not hold its text; make it by `c2c prefill`.")
        context = _Context(
            cache.text, text_hash(cache.input_ids, cache.attention_mask), cache.source or SharerSource()
        )
        self._checked[path] = (version, context)
        return context

    @torch.no_grad()
    def _prepare(self, inputs: BatchFeature, length: int, path: Path, source: SlotSource) -> PreparedSlots:
        """Compute the states of the first `length` positions, the slots and what is before them."""
        # One token behind the slots is computed, too, since a prompt does not end with a slot.
        head = {name: inputs[name][:, : length + 1] for name in ("input_ids", "attention_mask", "sharer_alignment")}
        sharer = {name: inputs[name] for name in ("sharer_input_ids", "sharer_attention_mask")}
        cache = full_length_cache()
        self._model(
            **{name: tensor.to(self._model.device) for name, tensor in {**head, **sharer}.items()},
            **{CACHE_ARGUMENT: cache},
            sharer_caches=SharerCache.from_safetensors(path),
            use_cache=True,
            logits_to_keep=1,
        )
        layers = [(keys[0, :, :length], values[0, :, :length]) for keys, values in cached_states(cache)]
        return PreparedSlots(source, inputs["input_ids"][0, :length], layers)
