"""`Engine`: answers prompts with one model, in batches, from any number of threads."""

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import (
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
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


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt, how it is answered, and what is called meanwhile.

    Attributes:
        prompt: What is asked.
        options: How it is answered.
        finish: Called once, with the answer or the error, as soon as there is one.
        emit: Called with every piece of the text. `None`: not.
        is_cancelled: Asked after every token whether to stop. `None`: never.
    """

    prompt: Prompt
    options: GenerationOptions
    finish: Callable[[GeneratedAnswer | Exception], None]
    emit: Callable[[str], None] | None = None
    is_cancelled: Callable[[], bool] | None = None


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


class _Row:
    """One request in a batch.

    Args:
        request: The request.
        inputs: Of the processor, without tensors.
        max_new_tokens: Maximum length of the answer.
        processors: What is done to its scores.
    """

    def __init__(
        self, request: AnswerRequest, inputs: BatchFeature, max_new_tokens: int, processors: LogitsProcessorList
    ) -> None:
        self.request, self.inputs, self.processors = request, inputs, processors
        self.prompt_length, self.max_new_tokens = len(inputs["input_ids"]), max_new_tokens
        self.num_tokens, self.finished = 0, False

    def follow(self, input_ids: torch.Tensor, stream: TextStream) -> None:
        """Take the newest token, `input_ids` of `(1, seq_len)`; where it is the last, hand on the answer at once."""
        if self.finished:
            return
        stops = bool(stream(input_ids, None))
        self.num_tokens = stream.num_tokens
        if stops or self.num_tokens >= self.max_new_tokens:
            self.end(stream)

    def end(self, stream: TextStream) -> None:
        """Hand on the answer, unless that was done."""
        if self.finished:
            return
        self.finished, text = True, stream.finish()
        reason = "stop" if stream.reached_end or self.num_tokens < self.max_new_tokens else "length"
        self.request.finish(GeneratedAnswer(text, reason, self.prompt_length, self.num_tokens))


class _RowProcessors(LogitsProcessor):
    """Changes the scores of every row by processors of its own."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parts = zip(self._rows, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([row.processors(ids, own) if row.processors else own for row, ids, own in parts])


class _RowStreams(StoppingCriteria):
    """Follows the tokens of every row."""

    def __init__(self, rows: Sequence[_Row], streams: Sequence[TextStream]) -> None:
        self._rows, self._streams = rows, streams

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, stream, ids in zip(self._rows, self._streams, input_ids.split(1), strict=True):
            row.follow(ids, stream)
        return torch.tensor([row.finished for row in self._rows], device=input_ids.device)


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
        return prefill_context(self.model, self.processor.pad([self._encode(question)]), text)

    def batch_key(self, prompt: Prompt, options: GenerationOptions) -> Hashable | None:
        """Return what requests of one batch have in common; `None`: this one is answered alone."""
        config = self.model.generation_config
        # These look at padding as they look at tokens.
        sees_padding = config.min_length or config.repetition_penalty not in (None, 1.0)
        return None if prompt.prefilled is not None or sees_padding else options.fusion

    def generate(self, requests: Sequence[AnswerRequest]) -> None:
        """Generate the answers to requests of one [`Engine.batch_key`], padded to one batch.

        Every answer is handed on as soon as it is complete. Where a batch fails before its first token, each request
        is answered alone, so that its fault is not that of others.

        Args:
            requests: What is asked. The error is a `ValueError` where a prompt is empty or too long, a message is
                none, or there is no chat template.
        """
        waiting = []
        for request in requests:
            try:
                waiting.append(self._row(request))
            except Exception as error:
                request.finish(error)
        while waiting:
            batch: list[_Row] = []
            for row in waiting:
                if not batch or self._fits([*batch, row]):
                    batch.append(row)
            waiting = [row for row in waiting if row not in batch]
            self._answer(batch)

    def _answer(self, rows: Sequence[_Row]) -> None:
        try:
            self._generate(rows)
        except Exception as error:
            if len(rows) > 1 and all(row.num_tokens == 0 for row in rows):
                for row in rows:
                    self._answer([row])
            else:
                for row in rows:
                    if not row.finished:
                        row.request.finish(error)

    def _fits(self, rows: Sequence[_Row]) -> bool:
        """Return whether the longest answer fits behind the longest prompt: rows that have ended go on with it."""
        length = max(row.prompt_length for row in rows) + max(row.max_new_tokens for row in rows)
        return self._context_length is None or length <= self._context_length

    def _generate(self, rows: Sequence[_Row]) -> None:
        inputs = self.processor.pad([row.inputs for row in rows]).to(self.model.device)
        config = copy.deepcopy(self.model.generation_config)
        config.update(
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max(row.max_new_tokens for row in rows),
            max_length=None,
        )
        eos = config.eos_token_id
        eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        prompt_length, tokenizer = inputs["input_ids"].shape[1], self.processor.tokenizer
        streams = [
            TextStream(
                *(tokenizer, prompt_length, row.request.emit, row.request.options.stop, eos_token_ids),
                row.request.is_cancelled,
            )
            for row in rows
        ]
        first = rows[0].request
        prefilled = {} if first.prompt.prefilled is None else first.prompt.prefilled.generate_arguments(self.model)
        draws = any(row.processors for row in rows)
        with nullcontext() if first.options.fusion else self.model.disable_fusion():
            self.model.generate(
                **inputs,
                **prefilled,
                generation_config=config,
                logits_processor=LogitsProcessorList([_RowProcessors(rows)] if draws else []),
                stopping_criteria=StoppingCriteriaList([_RowStreams(rows, streams)]),
            )
        for row, stream in zip(rows, streams, strict=True):
            row.end(stream)

    def _encode(self, prompt: Prompt) -> BatchFeature:
        """Tokenize a prompt for all models, without tensors."""
        arguments: dict[str, Any] = {"sharer_context": prompt.sharer_context or None, "return_tensors": None}
        if isinstance(prompt.content, str):
            return self.processor(prompt.content, **arguments)
        if self.processor.tokenizer.chat_template is None:
            raise ValueError("The receiver has no chat template; use /v1/completions.")
        arguments |= dict(prompt.template_kwargs)
        return cast(BatchFeature, self.processor.apply_chat_template(prompt.content, **arguments))

    def _row(self, request: AnswerRequest) -> _Row:
        """Tokenize a prompt; the answer is greedy, on scores with noise where it is drawn."""
        inputs, options, config = self._encode(request.prompt), request.options, self.model.generation_config
        prompt_length = len(inputs["input_ids"])
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
        return _Row(request, inputs, max_new_tokens, processors)
