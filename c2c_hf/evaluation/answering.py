"""Answerers: a model scores continuations of prompts and writes answers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .._compat import accepts_argument
from ..alignment.chat_template import Message, plain_messages
from ..checkpoints.receiver_adapter import adapter_disabled
from ..inference.loglikelihood import scores_after
from ..inference.output_head import contiguous_head
from ..inference.passes import check_length
from ..inference.prefill import position_ids_from_mask

#: What a tokenizer or processor makes, each sharer's tensors in a list.
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One prompt.

    Attributes:
        prompt: Plain text, or a conversation, which each model's own chat template renders.
        continues: Whether the conversation's last message is the beginning of the answer.
        seed: For controls that draw at random.
        donor: Another question's prompt, for the controls that need one.
        question: The bare question, for methods that ask about it first.
        context: What the question is about, for those that read it.
        donor_context: Another question's.
    """

    prompt: str | Sequence[Message]
    continues: bool = False
    seed: int = 0
    donor: str | Sequence[Message] | None = None
    question: str = ""
    context: str = ""
    donor_context: str = ""

    def reading_context(self) -> "Query":
        """Return the query with its context in front of its prompt."""
        return replace(self, prompt=put_in_front(f"{self.context}\n\n", self.prompt)) if self.context else self


def put_in_front(head: str, prompt: str | Sequence[Message]) -> str | Sequence[Message]:
    """Put a text in front of a prompt, or of what the user said last in a conversation."""
    if isinstance(prompt, str):
        return head + prompt
    messages = list(prompt)
    # Behind it may stand the beginning of an answer.
    index = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[index] = {**messages[index], "content": f"{head}{messages[index]['content']}"}
    return messages


@dataclass
class Seconds:
    """Where a batch's time went, in seconds; `total` includes tokenization.

    On a processor `prefill` holds the sharers' time too: there C2C lets them read beside the receiver.
    """

    total: float = 0.0
    sharer: float = 0.0
    fusion: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass
class ContinuationScore:
    """Log-likelihood of one continuation, its number of tokens, and whether greedy decoding would write it."""

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclass
class Written:
    """A written answer: up to the stop string, its number of tokens, and of those that were read to write it."""

    text: str
    num_tokens: int
    prompt_tokens: int


@dataclass
class Answerer(ABC):
    """Scores continuations and writes answers: a [`PlainAnswerer`] with one model, a [`C2CAnswerer`] with several.

    Attributes:
        seconds: Times of the last call.
        gate_weights: How wide the fusers opened in the last call, see [`~gate_weights.watch_gate_weights`], a number a
            query; empty where no gate was at work.
        max_length: Longest prompt in tokens, longer ones lose their beginning; `None`: they are refused.
        template_kwargs: Handed to chat templates.
    """

    seconds: Seconds = field(default_factory=Seconds, init=False)
    gate_weights: list[float] = field(default_factory=list, init=False)
    max_length: int | None = field(default=None, init=False)
    template_kwargs: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that continues a prompt."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""

    @abstractmethod
    def _inputs(self, queries: Sequence[Query], strip: bool) -> Inputs:
        """Tokenize prompts, padded left, on the model's device; `strip` takes the space off the end of plain ones."""

    @torch.no_grad()
    def score(self, queries: Sequence[Query], continuations: Sequence[Sequence[str]]) -> list[list[ContinuationScore]]:
        """Score continuations of each prompt, which is read once for all of them.

        Args:
            queries: The prompts, one batch.
            continuations: Per prompt its continuations, as they stand behind it.

        Raises:
            ValueError: A continuation has no token, or a prompt is too long.
        """
        ids = [self._continuation_ids(query, texts) for query, texts in zip(queries, continuations, strict=True)]
        with self._timed():
            inputs = self._inputs(queries, strip=True)
            check_length("queries", self.model, inputs["input_ids"].shape[1])
            with self._reading(inputs, queries) as reading:
                start = now()
                model_inputs = {**reading, "use_cache": True, "logits_to_keep": 1}
                for name in ("position_ids", "logits_to_keep"):
                    if name in model_inputs and not accepts_argument(self.model, name):
                        del model_inputs[name]
                outputs = self.model(**model_inputs)
                self.seconds.prefill = now() - start - self.seconds.fusion
                start = now()
                scores = scores_after(self.model, outputs, inputs["attention_mask"], ids)
                self.seconds.decode = now() - start
        flat = zip(
            scores.logprobs.sum(1).tolist(), scores.is_token.sum(1).tolist(), scores.is_greedy.tolist(), strict=True
        )
        return [[ContinuationScore(*next(flat)) for _ in row] for row in ids]

    @torch.no_grad()
    def write(
        self, queries: Sequence[Query], max_new_tokens: int, stop: Sequence[str] = (), **generation: Any
    ) -> list[Written]:
        """Write an answer to each prompt, greedily unless told otherwise.

        Args:
            queries: The prompts, one batch.
            max_new_tokens: Longest answer.
            stop: Strings at which an answer ends; they are cut off.
            **generation: Arguments of `generate`.

        Raises:
            ValueError: A prompt is too long.
        """
        with self._timed():
            inputs = self._inputs(queries, strip=False)
            check_length("queries", self.model, inputs["input_ids"].shape[1])
            clock = _StopStrings(self.tokenizer, stop, inputs["input_ids"].shape[1])
            with self._reading(inputs, queries) as reading:
                reading.pop("position_ids", None)
                start = now()
                out = self.model.generate(
                    **reading,
                    max_new_tokens=max_new_tokens,
                    stopping_criteria=StoppingCriteriaList([clock]),
                    pad_token_id=_pad_token_id(self.tokenizer),
                    **{"do_sample": False, **generation},
                )
                end = now()
        first = end if clock.first_token is None else clock.first_token
        self.seconds.prefill, self.seconds.decode = first - start - self.seconds.fusion, end - first
        written = []
        for row, mask in zip(out[:, inputs["input_ids"].shape[1] :].tolist(), inputs["attention_mask"], strict=True):
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            for string in stop:
                text = text.partition(string)[0]
            # Rows that end early are filled up with padding or end tokens, of which the first may be real.
            tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            written.append(Written(text, min(tokens, max_new_tokens), int(mask.sum())))
        return written

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self.seconds, self.gate_weights = Seconds(), []
        start = now()
        with contiguous_head(self.model):
            yield
        self.seconds.total = now() - start

    @abstractmethod
    def _reading(self, inputs: Inputs, queries: Sequence[Query]) -> AbstractContextManager[dict[str, Any]]:
        """Hold while the model works; hands out what it is called with."""

    def _continuation_ids(self, query: Query, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize continuations behind their prompt, where letters may join across the seam."""
        plain = isinstance(query.prompt, str) or not self.tokenizer.chat_template
        prompt = self._render(query)
        # Words carry their space in front: a space that ends the prompt belongs to the continuation.
        stripped = prompt.rstrip() if plain else prompt
        seam = prompt[len(stripped) :]

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=plain)["input_ids"]

        length = len(ids(stripped))
        tokenized = [ids(stripped + seam + text)[length:] for text in texts]
        if not all(tokenized):
            raise ValueError(f"`continuations` must each give at least one token, but got {list(texts)!r:.200}.")
        return tokenized

    def _template_kwargs(self, query: Query) -> dict[str, Any]:
        turns = {"add_generation_prompt": not query.continues, "continue_final_message": query.continues}
        return {**self.template_kwargs, **turns}

    def _render(self, query: Query) -> str:
        if isinstance(query.prompt, str):
            return query.prompt
        messages = plain_messages(query.prompt)
        if not self.tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        kwargs = self._template_kwargs(query)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))


@dataclass
class PlainAnswerer(Answerer):
    """A model by itself.

    Args:
        base_model: Any causal language model.
        base_tokenizer: Its tokenizer.
        with_adapter: Whether an adapter that the model has is at work.
        reads_context: Whether it reads what the question is about.
    """

    base_model: PreTrainedModel
    base_tokenizer: PreTrainedTokenizerBase
    with_adapter: bool = False
    reads_context: bool = False

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.base_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.base_tokenizer

    @contextmanager
    def _reading(self, inputs: Inputs, queries: Sequence[Query]) -> Iterator[dict[str, Any]]:
        with nullcontext() if self.with_adapter else adapter_disabled(self.base_model):
            yield {**inputs, "position_ids": position_ids_from_mask(inputs["attention_mask"])}

    def _inputs(self, queries: Sequence[Query], strip: bool) -> Inputs:
        rows = []
        for query in queries:
            query = query.reading_context() if self.reads_context else query
            plain = isinstance(query.prompt, str) or not self.tokenizer.chat_template
            text = self._render(query)
            text = text.rstrip() if plain and strip else text
            rows.append(self.tokenizer(text, add_special_tokens=plain)["input_ids"][-(self.max_length or 0) :])
        width = max(len(row) for row in rows)
        pad = _pad_token_id(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}


class _StopStrings(StoppingCriteria):
    """Ends a row at a stop string, and notes when the first token was there."""

    # transformers' own criteria index the whole vocabulary first, half a minute for one of 262,144 tokens.

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.first_token: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.first_token is None:
            self.first_token = now()
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        ended = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # The mask decides; any id serves where there is no padding token.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def now() -> float:
    """Return the time in seconds, when all work that was queued on a device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
