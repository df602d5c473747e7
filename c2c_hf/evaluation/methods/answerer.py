"""`Answerer`: a model scores continuations of prompts and generates answers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..._compat import accepts_argument
from ...alignment.chat_template import Message, plain_messages
from ...alignment.padding import pad_token_id
from ...checkpoints.receiver_adapter import adapter_disabled
from ...inference.loglikelihood import scores_after
from ...inference.probe import check_length, model_position_ids

#: Largest number of other items that a query brings as examples.
MAX_EXAMPLES = 16

#: Plain text, or a conversation, which each model's own chat template renders.
Prompt: TypeAlias = str | Sequence[Message]


@dataclass(frozen=True)
class Query:
    """One prompt, and what methods and controls need beside it.

    Attributes:
        prompt: The receiver's prompt.
        continues: Whether the conversation's last message is the beginning of the answer.
        seed: For controls that draw at random.
        mismatched_prompt: Another question's prompt, for the mismatched-sharer control; `None`: there is none.
        question: The bare question, for methods that ask a sharer about it first.
        context: A text that the question is about, for sharers and methods that prefill it; may be empty.
        mismatched_context: Another question's context.
        examples: Other questions with their answers, at most `MAX_EXAMPLES`.
        max_answer_tokens: Where continuations are whole answers, each is scored up to this number of tokens, and a
            shorter one with the end-of-sequence token. `None`: continuations are scored as they are.
    """

    prompt: Prompt
    continues: bool = False
    seed: int = 0
    mismatched_prompt: Prompt | None = None
    question: str = ""
    context: str = ""
    mismatched_context: str = ""
    examples: Sequence[str] = ()
    max_answer_tokens: int | None = None

    def with_context_in_prompt(self) -> "Query":
        """Return the query with its context at the beginning of its prompt."""
        return replace(self, prompt=prepend_text(f"{self.context}\n\n", self.prompt)) if self.context else self

    def examples_text(self, count: int) -> str:
        """Return the first `count` examples as one text, without the blank line that ends it.

        Raises:
            ValueError: There are none.
        """
        if not self.examples:
            raise ValueError(
                "`examples` must hold other questions with their answers, but the task has no other item."
            )
        return "\n\n".join(self.examples[:count])

    def with_examples_in_prompt(self, count: int) -> "Query":
        """Return the query with `count` examples at the beginning of its prompt."""
        return replace(self, prompt=prepend_text(f"{self.examples_text(count)}\n\n", self.prompt)) if count else self


def prepend_text(text: str, prompt: Prompt) -> Prompt:
    """Put a text before a prompt, in a conversation before the content of the last user message."""
    if isinstance(prompt, str):
        return text + prompt
    messages = list(prompt)
    # The beginning of an answer may follow it.
    index = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[index] = {**messages[index], "content": f"{text}{messages[index]['content']}"}
    return messages


@dataclass(frozen=True)
class PromptBatch:
    """Tokenized prompts, padded on the left, on the model's device.

    Attributes:
        input_ids: `(batch_size, seq_len)`.
        attention_mask: `(batch_size, seq_len)`.
        sharer_input_ids: Per sharer `(batch_size, sharer_len)`; empty where no sharer is used.
        sharer_attention_mask: Per sharer `(batch_size, sharer_len)`.
        sharer_alignment: Per sharer `(batch_size, seq_len)`: the sharer position of each receiver position, or -1.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    sharer_input_ids: Sequence[torch.Tensor] = ()
    sharer_attention_mask: Sequence[torch.Tensor] = ()
    sharer_alignment: Sequence[torch.Tensor] = ()

    def inputs_for(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return a plain model's arguments: the receiver's tokens, and positions that count real tokens only."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        position_ids = model_position_ids(model, self.attention_mask)
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if accepts_argument(model, "logits_to_keep"):
            # An index rather than 1: a slice of the hidden states makes the head slow, see `last_positions`.
            inputs["logits_to_keep"] = torch.tensor([-1], device=self.input_ids.device)
        return inputs

    def fusion_inputs(self) -> dict[str, Any]:
        """Return the arguments of [`C2CForCausalLM`]."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "sharer_input_ids": list(self.sharer_input_ids),
            "sharer_attention_mask": list(self.sharer_attention_mask),
            "sharer_alignment": list(self.sharer_alignment),
            "logits_to_keep": 1,
        }


@dataclass
class Seconds:
    """Seconds of a batch by stage; `total` includes tokenization.

    `prefill` includes the sharers' prefill where C2C runs it beside the receiver's, as on the CPU.
    """

    total: float = 0.0
    sharer: float = 0.0
    fusion: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass
class ContinuationScore:
    """Log-likelihood of one continuation, its number of tokens, and whether greedy decoding would generate it."""

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclass
class GeneratedAnswer:
    """A generated answer up to the stop string, its number of tokens, and the number of prompt tokens prefilled."""

    text: str
    num_tokens: int
    prompt_tokens: int


@dataclass
class Method(ABC):
    """Scores continuations and generates answers.

    Attributes:
        seconds: Of the last call.
        gate_weights: The mean gate weight of each query in the last call, see
            [`~gate_weights.record_gate_weights`]; empty where no gate was used.
    """

    seconds: Seconds = field(default_factory=Seconds, init=False)
    gate_weights: list[float] = field(default_factory=list, init=False)

    @abstractmethod
    def score(self, queries: Sequence[Query], continuations: Sequence[Sequence[str]]) -> list[list[ContinuationScore]]:
        """Score continuations of each prompt.

        Args:
            queries: The prompts, one batch.
            continuations: Per prompt its continuations, with the delimiter in front.
        """

    @abstractmethod
    def generate(
        self, queries: Sequence[Query], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[GeneratedAnswer]:
        """Generate an answer to each prompt.

        Args:
            queries: The prompts, one batch.
            max_new_tokens: Maximum length of an answer.
            stop: Strings at which an answer ends; they are cut off.
        """


@dataclass
class Answerer(Method):
    """A model answers: a [`ModelAnswerer`] without fusion, a [`C2CAnswerer`] with it.

    Attributes:
        max_length: Longest prompt in tokens, longer ones are truncated on the left; `None`: they are refused.
        chat_template_kwargs: Arguments of chat templates.
    """

    max_length: int | None = field(default=None, init=False)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that continues a prompt."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""

    @abstractmethod
    def tokenize(self, queries: Sequence[Query], strip: bool) -> PromptBatch:
        """Tokenize prompts.

        Args:
            queries: The prompts, one batch.
            strip: Whether spaces at the end of plain prompts are removed.
        """

    @abstractmethod
    def _inference(self, batch: PromptBatch, queries: Sequence[Query]) -> AbstractContextManager[dict[str, Any]]:
        """Return a context for the time that the model runs; it yields the model's arguments."""

    @torch.no_grad()
    def score(self, queries: Sequence[Query], continuations: Sequence[Sequence[str]]) -> list[list[ContinuationScore]]:
        """Score continuations of each prompt, which is prefilled once for all of them.

        Args:
            queries: The prompts, one batch.
            continuations: Per prompt its continuations, with the delimiter in front.

        Raises:
            ValueError: A continuation has no token, or a prompt is too long.
        """
        ids = [self._continuation_ids(query, texts) for query, texts in zip(queries, continuations, strict=True)]
        with self._timed():
            batch = self.tokenize(queries, strip=True)
            check_length("queries", self.model, batch.input_ids.shape[1])
            with self._inference(batch, queries) as inputs:
                start = synchronized_time()
                outputs = self.model(**inputs, use_cache=True)
                self.seconds.prefill = synchronized_time() - start - self.seconds.fusion
                start = synchronized_time()
                scores = scores_after(self.model, outputs, batch.attention_mask, ids)
                self.seconds.decode = synchronized_time() - start
        flat = zip(
            scores.logprobs.sum(1).tolist(), scores.is_token.sum(1).tolist(), scores.is_greedy.tolist(), strict=True
        )
        return [[ContinuationScore(*next(flat)) for _ in row] for row in ids]

    @torch.no_grad()
    def generate(
        self, queries: Sequence[Query], max_new_tokens: int, stop: Sequence[str] = (), **generation: Any
    ) -> list[GeneratedAnswer]:
        """Generate an answer to each prompt, greedily by default.

        Args:
            queries: The prompts, one batch.
            max_new_tokens: Maximum length of an answer.
            stop: Strings at which an answer ends; they are cut off.
            **generation: Further arguments of the model's `generate`.

        Raises:
            ValueError: A prompt is too long.
        """
        with self._timed():
            batch = self.tokenize(queries, strip=False)
            prompt_length = batch.input_ids.shape[1]
            check_length("queries", self.model, prompt_length)
            stop_strings = _StopStrings(self.tokenizer, stop, prompt_length)
            with self._inference(batch, queries) as inputs:
                # `generate` counts positions by itself.
                inputs.pop("position_ids", None)
                start = synchronized_time()
                out = self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    stopping_criteria=StoppingCriteriaList([stop_strings]),
                    pad_token_id=pad_token_id(self.tokenizer),
                    **{"do_sample": False, **generation},
                )
                end = synchronized_time()
        first = end if stop_strings.first_token_time is None else stop_strings.first_token_time
        self.seconds.prefill, self.seconds.decode = first - start - self.seconds.fusion, end - first
        answers = []
        for row, mask in zip(out[:, prompt_length:].tolist(), batch.attention_mask, strict=True):
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            for string in stop:
                text = text.partition(string)[0]
            # Rows that end early are filled up with padding or end tokens, of which the first may be real.
            tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            answers.append(GeneratedAnswer(text, min(tokens, max_new_tokens), int(mask.sum())))
        return answers

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self.seconds, self.gate_weights = Seconds(), []
        start = synchronized_time()
        yield
        self.seconds.total = synchronized_time() - start

    def _continuation_ids(self, query: Query, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize continuations together with their prompt, since tokens may differ at the boundary."""
        plain = isinstance(query.prompt, str) or not self.tokenizer.chat_template
        prompt = self._render(query)
        # Words carry their space in front: a space that ends the prompt belongs to the continuation.
        stripped = prompt.rstrip() if plain else prompt
        spaces = prompt[len(stripped) :]

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=plain)["input_ids"]

        length = len(ids(stripped))
        tokenized = [ids(stripped + spaces + text)[length:] for text in texts]
        if not all(tokenized):
            raise ValueError(f"`continuations` must each give at least one token, but got {list(texts)!r:.200}.")
        if query.max_answer_tokens is not None:
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            limit = query.max_answer_tokens
            tokenized = [[*row, *end] if len(row) <= limit else row[:limit] for row in tokenized]
        return tokenized

    def _template_arguments(self, query: Query) -> dict[str, Any]:
        turns = {"add_generation_prompt": not query.continues, "continue_final_message": query.continues}
        return {**self.chat_template_kwargs, **turns}

    def _render(self, query: Query) -> str:
        if isinstance(query.prompt, str):
            return query.prompt
        messages = plain_messages(query.prompt)
        if not self.tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        arguments = self._template_arguments(query)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments))


@dataclass
class ModelAnswerer(Answerer):
    """A base model answers without fusion.

    Args:
        base_model: Any causal language model.
        base_tokenizer: Its tokenizer.
        with_adapter: Whether a PEFT adapter that the model has is enabled.
        with_context: Whether the prompt begins with the query's context.
        num_examples: With how many of the query's examples it begins.
    """

    base_model: PreTrainedModel
    base_tokenizer: PreTrainedTokenizerBase
    with_adapter: bool = False
    with_context: bool = False
    num_examples: int = 0

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.base_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.base_tokenizer

    def tokenize(self, queries: Sequence[Query], strip: bool) -> PromptBatch:
        """Tokenize prompts with the model's own chat template.

        Args:
            queries: The prompts, one batch.
            strip: Whether spaces at the end of plain prompts are removed.
        """
        rows = []
        for query in queries:
            query = query.with_context_in_prompt() if self.with_context else query
            query = query.with_examples_in_prompt(self.num_examples)
            plain = isinstance(query.prompt, str) or not self.tokenizer.chat_template
            text = self._render(query)
            text = text.rstrip() if plain and strip else text
            rows.append(self.tokenizer(text, add_special_tokens=plain)["input_ids"][-(self.max_length or 0) :])
        width = max(len(row) for row in rows)
        pad = pad_token_id(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return PromptBatch(ids.to(self.model.device), mask.to(self.model.device))

    @contextmanager
    def _inference(self, batch: PromptBatch, queries: Sequence[Query]) -> Iterator[dict[str, Any]]:
        with nullcontext() if self.with_adapter else adapter_disabled(self.base_model):
            yield batch.inputs_for(self.base_model)


class _StopStrings(StoppingCriteria):
    """Ends a row at a stop string, and records the time of the first token."""

    # transformers' own criteria index the whole vocabulary first: half a minute for 262,144 tokens.

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.first_token_time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.first_token_time is None:
            self.first_token_time = synchronized_time()
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        ended = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def synchronized_time() -> float:
    """Return the time in seconds after all queued work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
