"""Tokenization of training rows: chats, multiple choice, prompt/completion or plain texts -> examples."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, cast

from ..processing_c2c import C2CProcessor
from .passages import PASSAGE_COLUMNS

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_FORMATS = ("letter", "text", "both")
QUESTION_TEMPLATE = "{question}\n{choices}\nAnswer:"

#: Columns that a data set must have, by kind of row.
ROW_COLUMNS: dict[str, frozenset[str]] = {
    "chat": frozenset({"messages"}),
    "chat in ShareGPT's format": frozenset({"conversations"}),
    "multiple choice": frozenset({"question", "choices", "answer"}),
    "prompt and completion": frozenset({"prompt", "completion"}),
    "questions on passages": PASSAGE_COLUMNS,
    "text": frozenset({"text"}),
}
#: Roles in `conversations` rows (OpenHermes-2.5 and other ShareGPT data).
_ROLES = {"human": "user", "gpt": "assistant"}


class Example(TypedDict):
    """One assistant turn, in memory mode with those that follow it; or a text that continues its sharer-only context.

    Attributes:
        input_ids: The receiver's tokens of the prompt.
        answer_ids: The receiver's tokens of the answer; in memory mode also those of later turns; or those of the
            continuation.
        is_target: Per token of `answer_ids` whether it is to be learned, as no question of a later turn is.
        is_continuation: Whether this is a text that continues its context.
        wrong_answer_ids: Those of each other choice of a multiple choice question, else empty.
        sharer_input_ids: Per sharer its tokens of the prompt, `sharer_context` included.
        sharer_attention_mask: Per sharer 1 for each of them.
        sharer_alignment: Per sharer and token of `input_ids` the aligned sharer position, or -1.
        length: Number of the receiver's tokens, prompt and answer.
    """

    input_ids: list[int]
    answer_ids: list[int]
    is_target: list[bool]
    is_continuation: bool
    wrong_answer_ids: list[list[int]]
    sharer_input_ids: list[list[int]]
    sharer_attention_mask: list[list[int]]
    sharer_alignment: list[list[int]]
    length: int


#: Columns of an example with one entry per sharer.
SHARER_COLUMNS = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment")
#: Columns of every example.
EXAMPLE_COLUMNS = frozenset({"input_ids", "answer_ids", *SHARER_COLUMNS})
#: How many places of a text are tried, where it can seldom be cut without a change of its tokens.
_MAX_CUTS = 8
#: Column of `RowTokenizer`'s output: whether the prompt leaves room for an answer.
FITS_COLUMN = "fits"


class Turn(NamedTuple):
    """An answer and what precedes it.

    Attributes:
        messages: The conversation up to the answer.
        separator: Text between prompt and answer where no chat template is used.
        answer: The answer.
        wrong_answers: The other choices of a multiple choice question.
    """

    messages: list[dict[str, Any]]
    separator: str
    answer: str
    wrong_answers: list[str]


def check_columns(columns: Sequence[str], name: str) -> None:
    """Check that the rows of a data set are of a known kind.

    Raises:
        ValueError: They are not.
    """
    if not any(needed <= set(columns) for needed in ROW_COLUMNS.values()):
        raise ValueError(
            f"{name} has the columns {sorted(columns)}, but needs `messages` (chats), `question`, `choices` and "
            "`answer` (multiple choice), `context`, `question` and `answers` (questions on passages), `prompt` and "
            "`completion`, or `text`; rename its columns."
        )


@dataclass
class RowTokenizer:
    """Tokenizes rows; a function that `datasets` can hash and send to other processes.

    Args:
        processor: The pair's.
        max_length: Largest number of receiver tokens, and of each sharer's.
        answer_format: Answer to a multiple choice question: `"letter"`, `"text"` of the choice, or `"both"`.
        question_template: Prompt of a multiple choice question, with `{question}` and `{choices}`.
        plain_text: Do not use the chat template.
        chat_template_kwargs: Arguments of the chat templates.
        name: Of the data set, for errors.
        log_dropped: Log each row with an example that does not fit.
        continuation_length: Largest number of receiver tokens of a continuation, see [`RowTokenizer.continuation`].
        min_prefix_length: Smallest number of receiver tokens in front of it.
        max_prefix_length: Largest number of them. `None`: as many as fit in `max_length`.
        seed: Of the places where texts are cut.
    """

    processor: C2CProcessor
    max_length: int
    answer_format: str
    question_template: str
    plain_text: bool
    chat_template_kwargs: dict[str, Any]
    name: str
    log_dropped: bool = False
    continuation_length: int = 48
    min_prefix_length: int = 24
    max_prefix_length: int | None = None
    seed: int = 42

    def __call__(self, rows: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Tokenize a batch of rows, given and returned by column.

        Raises:
            ValueError: A row is bad; the message names it.
        """
        columns: dict[str, list] = {name: [] for name in (*Example.__annotations__, FITS_COLUMN)}
        for position, index in enumerate(indices):
            row = {column: values[position] for column, values in rows.items()}
            try:
                tokenized = self.examples(row, index)
            except ValueError as error:
                row_id = f" (id {row['id']!r})" if row.get("id") is not None else ""
                raise ValueError(f"Row {index + 1}{row_id} of {self.name}: {error}") from error
            fit = [self.fits(example) for example in tokenized]
            for name, values in columns.items():
                values += fit if name == FITS_COLUMN else [dict(example)[name] for example in tokenized]
            if self.log_dropped and not all(fit):
                logger.warning(
                    "Row %d of %s is dropped, in whole or in part: a prompt leaves no room in `max_length=%d` tokens.",
                    index + 1,
                    self.name,
                    self.max_length,
                )
        return columns

    def examples(self, row: Mapping[str, Any], index: int) -> list[Example]:
        """Tokenize a row.

        Args:
            row: Of any kind but questions on passages.
            index: Its number, on which the place depends where a text is cut.

        Returns:
            One example per assistant turn; in memory mode, where the receiver's template allows it, one per chat. Of a
            text its continuation, or nothing where it is too short.
        """
        if not any(needed <= row.keys() for kind, needed in ROW_COLUMNS.items() if kind != "text"):
            continuation = self.continuation(row["text"], index)
            return [] if continuation is None else [continuation]
        context, turns = row.get("sharer_context") or None, list(self.turns(row))
        uses_template = not self.plain_text and self.processor.chat_template is not None
        if self.processor.mode == "memory" and uses_template and len(turns) > 1:
            chat = self.tokenize_chat(turns, context)
            if chat is not None:
                return [chat]
        return [self.tokenize(turn, context) for turn in turns]

    def fits(self, example: Example) -> bool:
        """Return whether all prompts are within `max_length`, the receiver's with at least one token of the answer."""
        return max(len(example["input_ids"]) + 1, *map(len, example["sharer_input_ids"])) <= self.max_length

    def turns(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """Split a row into answers and what precedes them."""
        if "messages" in row or "conversations" in row:
            yield from _chat_turns(row)
        elif "choices" in row:
            yield self._choice_turn(row)
        elif isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            turns = _chat_turns({"messages": [*row["prompt"], *row["completion"]]})
            yield from (turn for turn in turns if len(turn.messages) >= len(row["prompt"]))
        else:
            for column in ("prompt", "completion"):
                if not isinstance(row[column], str) or not row[column].strip():
                    raise ValueError(f"`{column}` must be a text that is not empty, but got {row[column]!r:.80}.")
            yield Turn([{"role": "user", "content": row["prompt"]}], "", row["completion"], [])

    def _choice_turn(self, row: Mapping[str, Any]) -> Turn:
        question, choices, answer = row["question"], row["choices"], row["answer"]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`question` must be a text that is not empty, but got {question!r:.80}.")
        texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        if not texts or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"`choices` must be a list of 2 to {len(LETTERS)} texts, but got {choices!r:.80}.")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"`answer` must be an index from 0 to {len(choices) - 1}, but got {answer!r}.")
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        # `str.format` would fail on a question with braces.
        prompt = self.question_template.replace("{choices}", "\n".join(lines)).replace("{question}", question)
        answers = {"letter": list(LETTERS[: len(choices)]), "text": choices, "both": lines}[self.answer_format]
        wrong = [other for other in answers if other != answers[answer]]
        return Turn([{"role": "user", "content": prompt}], " ", answers[answer], wrong)

    def tokenize(self, turn: Turn, context: str | None) -> Example:
        """Tokenize the prompt for all models, and the answers, cut to `max_length`, for the receiver.

        Args:
            turn: Prompt and answers. In a chat an answer ends as the receiver's template ends a turn, else with its
                end token.
            context: Text that only the sharers prefill, or `None`.

        Raises:
            ValueError: An answer has no tokens.
        """
        processor, options = self.processor, {**self.chat_template_kwargs, "add_generation_prompt": True}
        separator, chat = turn.separator, None
        if self.plain_text or processor.chat_template is None:
            prompt = "\n".join(str(message["content"] or "") for message in turn.messages)
            if separator == "\n":
                # Part of the prompt, as the messages in front are joined by it.
                prompt, separator = prompt + separator, ""
            inputs = processor(prompt, sharer_context=context, return_tensors=None)
        else:
            chat, separator = turn.messages, ""
            inputs = processor.apply_chat_template(chat, sharer_context=context, return_tensors=None, **options)
            prompt = str(processor.apply_chat_template(chat, tokenize=False, **options))
        prompt_ids = inputs["input_ids"]
        # Without the slots of memory mode.
        own_ids = processor.tokenizer(prompt, add_special_tokens=chat is None)["input_ids"]
        sharer_ids, sharer_mask, alignment = self._sharer_columns(inputs)
        room = max(1, self.max_length - len(prompt_ids))
        answer_ids, *wrong_ids = (
            self._answer_ids(prompt, own_ids, chat, separator + answer)[:room]
            for answer in (turn.answer, *turn.wrong_answers)
        )
        return Example(
            input_ids=prompt_ids,
            answer_ids=answer_ids,
            is_target=[True] * len(answer_ids),
            is_continuation=False,
            wrong_answer_ids=wrong_ids,
            sharer_input_ids=sharer_ids,
            sharer_attention_mask=sharer_mask,
            sharer_alignment=alignment,
            length=len(prompt_ids) + len(answer_ids),
        )

    def tokenize_chat(self, turns: Sequence[Turn], context: str | None) -> Example | None:
        """Tokenize a chat of several turns as one example, whose context is prefilled once.

        Args:
            turns: At least one.
            context: Text that only the sharers prefill, or `None`.

        Returns:
            The example; `None` where the template renders an earlier turn in another way once others follow.
        """
        render, options = self.processor.apply_chat_template, {**self.chat_template_kwargs, "tokenize": False}
        example = self.tokenize(turns[0], context)
        # `(text, whether it is to be learned)`, by turns questions and answers.
        pieces: list[tuple[str, bool]] = []
        text = ""
        for turn in turns:
            answered = [*turn.messages, {"role": "assistant", "content": turn.answer}]
            prompt = str(render(turn.messages, add_generation_prompt=True, **options))
            # Whitespace that a template writes after the end of a turn is no part of the answer.
            whole = str(render(answered, add_generation_prompt=False, **options)).rstrip()
            if not prompt.startswith(text) or not whole.startswith(prompt):
                return None
            pieces += [(prompt[len(text) :], False), (whole[len(prompt) :], True)]
            text = whole
        text = pieces[0][0]
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        num_prompt, is_target = len(ids), []
        for piece, is_answer in pieces[1:]:
            new = self._continue_ids(text, ids, piece, False)
            text, ids = text + piece, ids + new
            is_target += [is_answer] * len(new)
        room = max(1, self.max_length - len(example["input_ids"]))
        example["answer_ids"], example["is_target"] = ids[num_prompt:][:room], is_target[:room]
        example["length"] = len(example["input_ids"]) + len(example["answer_ids"])
        return example

    def continuation(self, text: object, index: int) -> Example | None:
        """Cut a text at random: what is before the cut is sharer-only context, what follows is to be learned.

        The text has the place of the first user message. The receiver has slots for all of its tokens before the cut
        but the last one, which it computes.

        Args:
            text: The text.
            index: Number of the row.

        Returns:
            The example; `None` where the text is too short, or cannot be cut without a change of its tokens.

        Raises:
            ValueError: `text` is no text, or the processor has no slots for the receiver's tokens.
        """
        processor = self.processor
        if processor.mode != "memory" or processor.memory_grid != "receiver":
            raise ValueError("a `text` row, which continues its context, needs memory mode on the receiver's grid.")
        if not isinstance(text, str):
            raise ValueError(f"`text` must be a text, but got {text!r:.80}.")
        encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        num_own = len(self._placeholder(None)["input_ids"])
        longest = min(
            len(ids) - max(1, self.continuation_length // 2), self.max_length - self.continuation_length - num_own
        )
        if self.max_prefix_length is not None:
            longest = min(longest, self.max_prefix_length)
        # Not inside of a character.
        cuts = [cut for cut in range(self.min_prefix_length, longest + 1) if offsets[cut][0] >= offsets[cut - 1][1]]
        generator = random.Random(f"{self.seed} {index}")
        for cut in generator.sample(cuts, min(len(cuts), _MAX_CUTS)):
            inputs = self._placeholder(text[: offsets[cut - 1][1]])
            sharer_ids, sharer_mask, alignment = self._sharer_columns(inputs)
            prompt_ids = inputs["input_ids"]
            end = 1 + max(position for row in alignment for position, slot in enumerate(row) if slot >= 0)
            num_context = (len(prompt_ids) - num_own) // len(processor.sharer_tokenizers)
            # The token in front of the cut, which the receiver computes, has no slot.
            slots_end = end - num_context + cut - 1
            if prompt_ids[end - num_context : slots_end] != ids[: cut - 1]:
                # The end of the context changes its tokens.
                continue
            answer_ids = ids[cut : cut + self.continuation_length]
            # In a plain text, its own first tokens are the attention sink.
            num_sink = processor.memory_sink_tokens
            kept = [[-1 if i < num_sink else slot for i, slot in enumerate(row[:slots_end])] for row in alignment]
            return Example(
                input_ids=[*prompt_ids[:slots_end], ids[cut - 1]],
                answer_ids=answer_ids,
                is_target=[True] * len(answer_ids),
                is_continuation=True,
                wrong_answer_ids=[],
                sharer_input_ids=sharer_ids,
                sharer_attention_mask=sharer_mask,
                sharer_alignment=[[*row, -1] for row in kept],
                length=slots_end + 1 + len(answer_ids),
            )
        return None

    def _placeholder(self, context: str | None) -> Mapping[str, Any]:
        """Return the inputs of a prompt of one character behind a sharer-only context."""
        if self.plain_text or self.processor.chat_template is None:
            return self.processor(".", sharer_context=context, return_tensors=None)
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": "."}],
            sharer_context=context,
            return_tensors=None,
            **self.chat_template_kwargs,
        )
        return cast("Mapping[str, Any]", inputs)

    def _sharer_columns(self, inputs: Mapping[str, Any]) -> list[list[list[int]]]:
        """Return the `SHARER_COLUMNS` of the processor's output, each with one list per sharer."""
        several = len(self.processor.sharer_tokenizers) > 1
        columns = [inputs[name] if several else [inputs[name]] for name in SHARER_COLUMNS]
        return [[list(map(int, row)) for row in column] for column in columns]

    def _answer_ids(
        self, prompt: str, prompt_ids: list[int], chat: list[dict[str, Any]] | None, answer: str
    ) -> list[int]:
        """Tokenize an answer as it follows the prompt; `chat` is `None` for plain text."""
        text = answer + (self.processor.tokenizer.eos_token or "")
        if chat is not None:
            options = {**self.chat_template_kwargs, "add_generation_prompt": False, "tokenize": False}
            conversation = [*chat, {"role": "assistant", "content": answer}]
            whole = str(self.processor.apply_chat_template(conversation, **options))
            # Whitespace that a template writes after the end of a turn is no part of the answer.
            text = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else text
        ids = self._continue_ids(prompt, prompt_ids, text, add_special_tokens=chat is None)
        if not ids:
            raise ValueError("the answer has no tokens.")
        return ids

    def _continue_ids(self, text: str, ids: list[int], piece: str, add_special_tokens: bool) -> list[int]:
        """Tokenize a text as it follows another one, whose tokens are `ids`."""
        tokenizer = self.processor.tokenizer
        together = tokenizer(text + piece, add_special_tokens=add_special_tokens)["input_ids"]
        if together[: len(ids)] == ids:
            return together[len(ids) :]
        # A token across the boundary could never be generated.
        return tokenizer(piece, add_special_tokens=False)["input_ids"]


def _chat_turns(row: Mapping[str, Any]) -> Iterator[Turn]:
    column = "messages" if "messages" in row else "conversations"
    messages = row[column]
    if not messages:
        raise ValueError(f"`{column}` is empty: a conversation needs a message and an answer to it.")
    if column == "conversations":
        messages = [
            {"role": _ROLES.get(message.get("from"), message.get("from")), "content": message.get("value")}
            for message in messages
        ]
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index + 1} of `{column}` has no `role`, but is {message!r:.80}.")
    # All rows of a data set have the same columns: those that a message lacks are None.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in chat:
        message.setdefault("content", "")
    answers = [i for i, message in enumerate(chat) if i > 0 and message["role"] == "assistant" and message["content"]]
    if not answers:
        raise ValueError(f"`{column}` has no assistant turn that answers something, so there is nothing to learn.")
    for index in answers:
        yield Turn(chat[:index], "\n", chat[index]["content"], [])
