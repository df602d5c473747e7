"""transformers' pipeline `"text-generation"` with a C2C model: prompts are tokenized for all models and fused."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY, TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from ..modeling_c2c import SHARER_ARGUMENTS, C2CForCausalLM
from ..processing_c2c import C2CProcessor

logger = logging.getLogger(__name__)

_TASK = "text-generation"
#: Arguments of a call that are the processor's.
_ENCODE_ARGUMENTS = ("add_special_tokens", "truncation", "max_length", "tools", "documents")


@dataclass(frozen=True)
class _PromptWithContext:
    """One prompt of several that have a context each.

    Attributes:
        prompt: A text or a chat.
        sharer_context: What only the sharers see.
    """

    prompt: Any
    sharer_context: str


class C2CTextGenerationPipeline(TextGenerationPipeline):
    """`pipeline("text-generation", model=c2c_model, tokenizer=processor)`: texts and chats in, fused answers out.

    Takes what transformers' own pipeline takes, and `sharer_context`. With any other model, transformers' own pipeline
    is returned.

    Args:
        model: A C2C model.
        tokenizer: Its [`C2CProcessor`]. The receiver's tokenizer, or `None`: the processor is that which was saved
            with the fuser, else one of the tokenizers that belong to the recorded base models.
        processor: The processor as well; goes before `tokenizer`.
        **kwargs: Those of transformers' pipeline.

    Raises:
        ValueError: The processor is that of another fuser, or there is none.

    Example:
        ```python
        pipe = pipeline("text-generation", model=model, tokenizer=processor)
        answers = pipe([[{"role": "user", "content": "Who keeps the lighthouse?"}]], sharer_context=document)
        ```
    """

    def __new__(cls, model: PreTrainedModel, **kwargs: Any) -> TextGenerationPipeline:
        """Make transformers' own pipeline for a model that is no C2C model."""
        if not isinstance(model, C2CForCausalLM):
            return TextGenerationPipeline(model=model, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: C2CForCausalLM,
        tokenizer: C2CProcessor | PreTrainedTokenizerBase | None = None,
        processor: C2CProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        given = next((one for one in (processor, tokenizer) if isinstance(one, C2CProcessor)), None)
        own = _find_processor(model, tokenizer) if given is None else given
        model.check_processor(own.settings)
        super().__init__(model=model, tokenizer=own.tokenizer, processor=own, **kwargs)

    def check_model_type(self, supported_models: Any) -> None:
        """Do nothing: the class was compared, and transformers' list has its own models only."""

    def _sanitize_parameters(
        self, sharer_context: str | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if sharer_context is not None:
            preprocess["sharer_context"] = sharer_context
        return preprocess, forward, postprocess

    def __call__(self, text_inputs: Any, sharer_context: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Complete texts or chats.

        Args:
            text_inputs: A text, a chat, or several; a generator or dataset gives a generator.
            sharer_context: Text that only the sharers see: one for all, or a list with one per text or chat.
            **kwargs: Those of transformers' pipeline, among them arguments of `generate` such as `streamer`.

        Returns:
            As transformers' pipeline.

        Raises:
            ValueError: There is not one context per text or chat.
        """
        if sharer_context is None or isinstance(sharer_context, str):
            context = {} if sharer_context is None else {"sharer_context": sharer_context}
            return super().__call__(text_inputs, **context, **kwargs)
        is_batch = isinstance(text_inputs, list | tuple) and not isinstance(next(iter(text_inputs), None), Mapping)
        prompts, contexts = list(text_inputs) if is_batch else [text_inputs], list(sharer_context)
        if len(prompts) != len(contexts):
            raise ValueError(
                f"`sharer_context` has {len(contexts)} entries for {len(prompts)} in `text_inputs`: give one for each."
            )
        rows = [
            _PromptWithContext(prompt if isinstance(prompt, str) else Chat(prompt), context)
            for prompt, context in zip(prompts, contexts, strict=True)
        ]
        return super().__call__(rows if is_batch else rows[0], **kwargs)

    def preprocess(
        self,
        prompt_text: Any,
        prefix: str = "",
        handle_long_generation: str | None = None,
        continue_final_message: bool | None = None,
        sharer_context: str | None = None,
        tokenizer_encode_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tokenize one prompt for all models.

        Args:
            prompt_text: A text, a `Chat`, or either with a context of its own.
            prefix: In front of a text.
            handle_long_generation: Must be `None`; `truncation` shortens prompts.
            continue_final_message: Of a chat. `None`: if the last message is the assistant's.
            sharer_context: Text that only the sharers see.
            tokenizer_encode_kwargs: Further arguments of the processor.
            **kwargs: `add_special_tokens`, `truncation`, `max_length`, `tools` and `documents`, for the processor, and
                arguments of `generate`.

        Returns:
            The prompt and its tokens, not padded: a batch is padded where it is run.

        Raises:
            ValueError: `handle_long_generation` is given.
        """
        if handle_long_generation is not None:
            raise ValueError(
                "`handle_long_generation` must be None, since it would cut tokens that are aligned already; pass "
                "`truncation=True` and `max_length`."
            )
        arguments = {name: kwargs[name] for name in _ENCODE_ARGUMENTS if kwargs.get(name) is not None}
        arguments |= {"sharer_context": sharer_context, **(tokenizer_encode_kwargs or {}), "return_tensors": None}
        if isinstance(prompt_text, _PromptWithContext):
            prompt_text, arguments["sharer_context"] = prompt_text.prompt, prompt_text.sharer_context
        if isinstance(prompt_text, Chat):
            arguments.pop("add_special_tokens", None)
            if continue_final_message is None:
                continue_final_message = prompt_text.messages[-1]["role"] == "assistant"
            tokens = self.processor.apply_chat_template(
                prompt_text.messages, continue_final_message=continue_final_message, **arguments
            )
        else:
            tokens = self.processor(prefix + prompt_text, **arguments)
        return {"prompt_text": prompt_text, "tokens": tokens}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> Any:
        rows = model_inputs.pop("tokens")
        # One without a list: transformers leaves a batch of one as it is.
        batch = self.processor.pad(rows if isinstance(rows, list) else [rows])
        batch = self._ensure_tensor_on_device(dict(batch), self.device)
        sharer_inputs = {name: batch.pop(name) for name in SHARER_ARGUMENTS if name in batch}
        return super()._forward({**model_inputs, **batch}, **sharer_inputs, **generate_kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the fuser and its processor.

        Args:
            save_directory: The folder; made if needed.
            **kwargs: Those of [`C2CForCausalLM.save_pretrained`].
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _find_processor(model: C2CForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> C2CProcessor:
    """Load the processor that was saved with a fuser, or make it from the receiver's tokenizer and recorded names.

    Raises:
        ValueError: A tokenizer is missing.
    """
    if model.name_or_path:
        try:
            revision = getattr(model.config, "_commit_hash", None)
            return C2CProcessor.from_pretrained(model.name_or_path, revision=revision)
        except (OSError, ValueError):
            logger.info("No processor was saved with %r.", model.name_or_path)
    same = tokenizer is not None and set(model.config.token_alignments) == {"identity"}
    try:
        return C2CProcessor.from_config(model.config, tokenizer, [tokenizer] * len(model.sharers) if same else None)
    except (OSError, ValueError) as error:
        raise ValueError(
            "`tokenizer` must be the fuser's `C2CProcessor`, since none was saved with the model and the sharers' "
            "tokenizers are not found by their names."
        ) from error


def register_pipeline() -> None:
    """Register [`C2CTextGenerationPipeline`] for the task `"text-generation"`; other models keep transformers' own."""
    # Taken out first: transformers warns of a task that is overwritten.
    entry = PIPELINE_REGISTRY.supported_tasks.pop(_TASK)
    PIPELINE_REGISTRY.register_pipeline(
        _TASK, C2CTextGenerationPipeline, pt_model=entry["pt"], default=entry["default"], type=entry["type"]
    )
