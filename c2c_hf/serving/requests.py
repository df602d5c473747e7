"""What requests may contain: OpenAI's fields, and those of the sharers' context."""

import inspect
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..processing_c2c import C2CProcessor
from .contexts import SharerContext
from .engine import GenerationOptions, Prompt

#: Fields that change no answer.
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "verbosity"),
)
#: Fields that are accepted with the one value that asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
#: Names that arguments of chat templates cannot have: those of the processor's own method, which guard against
#: special tokens in messages, say.
_RESERVED = set(inspect.signature(C2CProcessor.apply_chat_template).parameters)


def _check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_RESERVED & kwargs.keys()):
        raise ValueError(f"may not contain {', '.join(map(repr, taken))}")
    return kwargs


def _parse_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class Document(BaseModel):
    """One of several documents."""

    model_config = ConfigDict(extra="forbid")
    text: str
    title: str | None = None

    def __str__(self) -> str:
        return self.text if self.title is None else f"{self.title}\n{self.text}"


class StreamOptions(BaseModel):
    """What a stream contains."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TransformersOptions(BaseModel):
    """The `GenerationConfig` that `transformers chat` sends, as JSON."""

    model_config = ConfigDict(extra="forbid")
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    transformers_version: str | None = None


class Message(BaseModel):
    """A message of a chat; further fields go to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None


class Body(BaseModel):
    """The body of a request, without unknown fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_unicode(cls, data: Any) -> Any:
        try:
            json.dumps(data, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the texts are no unicode: half of a surrogate pair is missing") from error
        return data


class ContextRequest(Body):
    """The body of `POST /v1/contexts`: a text that only the sharers see."""

    sharer_context: str | None = None
    documents: list[str | Document] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "ContextRequest":
        if (self.sharer_context is None) == (self.documents is None):
            raise ValueError("give one of `sharer_context` and `documents`")
        return self

    def text(self) -> str:
        """Return the text."""
        return _join(self.sharer_context, self.documents) or ""


class LoadRequest(Body):
    """The body of `POST /load_model`."""

    model: str


class GenerationRequest(Body):
    """What both generating endpoints take."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    sharer_context: str | None = None
    documents: list[str | Document] | None = None
    context_id: str | None = None
    fusion: bool = True
    generation_config: Annotated[TransformersOptions | None, BeforeValidator(_parse_json)] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None
            and name not in _WITHOUT_EFFECT
            and not (name in _NEUTRAL and type(value) in (type(_NEUTRAL[name]), float) and value == _NEUTRAL[name])
        }

    @model_validator(mode="after")
    def _check_context(self) -> "GenerationRequest":
        if sum(value is not None for value in (self.sharer_context, self.documents, self.context_id)) > 1:
            raise ValueError("give at most one of `sharer_context`, `documents` and `context_id`")
        return self

    def options(self) -> GenerationOptions:
        """Return how to generate."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        max_tokens, temperature, top_p = self.max_tokens, self.temperature, self.top_p
        if (own := self.generation_config) is not None:
            max_tokens, top_p = max_tokens or own.max_new_tokens, own.top_p if top_p is None else top_p
            if temperature is None:
                temperature = own.temperature if own.do_sample else 0.0
        return GenerationOptions(max_tokens, temperature, top_p, self.seed, [s for s in stop if s], self.fusion)

    def context_text(self, prefilled: SharerContext | None) -> str | None:
        """Return the text that only the sharers see.

        Args:
            prefilled: That of `context_id`; `None`: it names none.
        """
        return _join(self.sharer_context, self.documents) if prefilled is None else prefilled.text


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)] = {}

    @model_validator(mode="after")
    def _rename_max_tokens(self) -> "ChatRequest":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    def prompts(self, prefilled: SharerContext | None) -> list[Prompt]:
        """Return the only prompt, see [`GenerationRequest.context_text`]."""
        messages = [message.model_dump(exclude_unset=True) for message in self.messages]
        return [Prompt(messages, self.context_text(prefilled), prefilled, self.chat_template_kwargs)]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1)]

    def prompts(self, prefilled: SharerContext | None) -> list[Prompt]:
        """Return the prompts, see [`GenerationRequest.context_text`]."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [Prompt(text, self.context_text(prefilled), prefilled) for text in texts]


def _join(sharer_context: str | None, documents: list[str | Document] | None) -> str | None:
    return sharer_context if documents is None else "\n\n".join(map(str, documents))
