"""`Engine`: answers one prompt with one model, from any number of threads."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..inference.probe import context_length
from ..inference.text_stream import TextStream
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .contexts import SharerContext, prefill_context


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        content: A plain text, or the messages of a chat.
        sharer_context: Text that only the sharers see; `None`: none.
        prefilled: That text where the sharers have prefilled it; `None`: they have not.
        template_kwargs: Arguments of every chat template.
    """

    content: str | Sequence[Mapping[str, Any]]
    sharer_context: str | None = None
    prefilled: SharerContext | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationOptions:
    """How it is answered. What is `None` is left to the model's generation configuration, which is greedy by default.

    Attributes:
        max_new_tokens: Maximum length of the answer; `None`: the engine's.
        temperature: 0 is greedy.
        top_p: Smallest probability of the tokens that are drawn from.
        seed: The same seed gives the same answer, whatever else the engine does; `None`: any.
        stop: Strings that end the answer; they are cut off.
        fusion: Off: the receiver by itself.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    fusion: bool = True


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer.

    Attributes:
        text: Without special tokens.
        finish_reason: `"stop"`, or `"length"` where the maximum length was reached.
        num_prompt_tokens: Of the receiver, memory slots included.
        num_tokens: Of the answer.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


class GumbelNoise(LogitsProcessor):
    """Makes the largest score a draw from the distribution (the Gumbel-max trick), by a generator of its own.

    `generate` with `do_sample=True` draws from the one generator that all threads share.

    Args:
        seed: `None`: any.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Add noise to scores, `(batch_size, vocab_size)`; those of -inf stay."""
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return scores + noise.to(scores)


class Engine:
    """Answers prompts with a model; every method may be called by several threads at once.

    Args:
        model: The model; it is put into evaluation mode.
        processor: Its processor.
        max_new_tokens: Maximum length of every answer.

    Raises:
        ValueError: The processor is not the model's.
    """

    def __init__(self, model: C2CForCausalLM, processor: C2CProcessor, max_new_tokens: int) -> None:
        model.check_processor(processor.settings)
        self.model = model.eval()
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self._context_length = context_length("receiver", model)

    def prefill(self, text: str) -> SharerContext:
        """Prefill the sharers with a context for any number of prompts.

        Raises:
            ValueError: The context is too long, empty, or the token alignment allows none.
        """
        if not text.strip():
            raise ValueError("The context is empty.")
        # The question makes no difference: a chat shares its beginning with every other one.
        chat = self.processor.tokenizer.chat_template is not None
        question = Prompt([{"role": "user", "content": "?"}] if chat else "?", text)
        return prefill_context(self.model, self._encode(question), text)

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        emit: Callable[[str], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> GeneratedAnswer:
        """Generate an answer.

        Args:
            prompt: What is asked.
            options: How it is answered.
            emit: Called with every piece of the text. `None`: not.
            is_cancelled: Asked after every token whether to stop. `None`: never.

        Raises:
            ValueError: The prompt is empty or too long, a message is none, or there is no chat template.
        """
        inputs = self._encode(prompt).to(self.model.device)
        prompt_length = inputs["input_ids"].shape[1]
        config, processors = self._generation_config(options, prompt_length)
        eos = config.eos_token_id
        eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        tokenizer = self.processor.tokenizer
        stream = TextStream(tokenizer, prompt_length, emit, options.stop, eos_token_ids, is_cancelled)
        prefilled = {} if prompt.prefilled is None else prompt.prefilled.generate_arguments(self.model)
        with nullcontext() if options.fusion else self.model.disable_fusion():
            self.model.generate(
                **inputs,
                **prefilled,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([stream]),
            )
        text = stream.finish()
        reason = "length" if stream.num_tokens >= config.max_new_tokens and not stream.reached_end else "stop"
        return GeneratedAnswer(text, reason, prompt_length, stream.num_tokens)

    def _encode(self, prompt: Prompt) -> BatchFeature:
        context = prompt.sharer_context or None
        if isinstance(prompt.content, str):
            return self.processor(prompt.content, sharer_context=context)
        if self.processor.tokenizer.chat_template is None:
            raise ValueError("The receiver has no chat template; use /v1/completions.")
        return cast(
            BatchFeature,
            self.processor.apply_chat_template(prompt.content, sharer_context=context, **dict(prompt.template_kwargs)),
        )

    def _generation_config(
        self, options: GenerationOptions, prompt_length: int
    ) -> tuple[GenerationConfig, LogitsProcessorList]:
        """Return what `generate` runs with: always greedily, on scores with noise where the answer is drawn."""
        config = copy.deepcopy(cast(GenerationConfig, self.model.generation_config))
        max_new_tokens = min(options.max_new_tokens or self.max_new_tokens, self.max_new_tokens)
        if self._context_length is not None:
            if prompt_length >= self._context_length:
                raise ValueError(
                    f"The prompt has {prompt_length} tokens, but the receiver's context is {self._context_length}; "
                    "shorten it."
                )
            max_new_tokens = min(max_new_tokens, self._context_length - prompt_length)
        temperature = options.temperature
        if temperature is None:
            own = 1.0 if config.temperature is None else config.temperature
            temperature = own if config.do_sample else 0.0
        processors = LogitsProcessorList()
        if temperature > 0:
            processors.append(TemperatureLogitsWarper(float(temperature)))
            if config.do_sample and config.top_k:
                processors.append(TopKLogitsWarper(config.top_k))
            top_p = options.top_p if options.top_p is not None else config.top_p if config.do_sample else None
            if top_p is not None and top_p < 1:
                processors.append(TopPLogitsWarper(top_p))
            processors.append(GumbelNoise(options.seed))
        config.update(
            do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_new_tokens, max_length=None
        )
        return config, processors
