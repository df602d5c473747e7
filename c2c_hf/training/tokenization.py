"""Tokenization of training rows: chats, multiple choice or prompt/completion -> one example per assistant turn."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from ..processing_c2c import C2CProcessor

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
}
#: Roles in `conversations` rows (OpenHermes-2.5 and other ShareGPT data).
_ROLES = {"human": "user", "gpt": "assistant"}


class Example(TypedDict):
    """One assistant turn.

    Attributes:
        input_ids: The receiver's tokens of the prompt.
        answer_ids: The receiver's tokens of the answer.
        wrong_answer_ids: Those of each other choice of a multiple choice question, else empty.
        sharer_input_ids: Per sharer its tokens of the prompt, `sharer_context` included.
        sharer_attention_mask: Per sharer 1 for each of them.
        sharer_alignment: Per sharer and token of `input_ids` the aligned sharer position, or -1.
        length: Number of the receiver's tokens, prompt and answer.
    """

    input_ids: list[int]
    answer_ids: list[int]
    wrong_answer_ids: list[list[int]]
    sharer_input_ids: list[list[int]]
    sharer_attention_mask: list[list[int]]
    sharer_alignment: list[list[int]]
    length: int


#: Columns of an example with one entry per sharer.
SHARER_COLUMNS = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment")
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
            "`answer` (multiple choice), or `prompt` and `completion`; rename its columns."
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
    """

    processor: C2CProcessor
    max_length: int
    answer_format: str
    question_template: str
    plain_text: bool
    chat_template_kwargs: dict[str, Any]
    name: str
    log_dropped: bool = False

    def __call__(self, rows: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Tokenize a batch of rows, given and returned by column.

        Raises:
            ValueError: A row is bad; the message names it.
        """
        columns: dict[str, list] = {name: [] for name in (*Example.__annotations__, FITS_COLUMN)}
        for position, index in enumerate(indices):
            row = {column: values[position] for column, values in rows.items()}
            try:
                context = row.get("sharer_context") or None
                tokenized = [self.tokenize(turn, context) for turn in list(self.turns(row))]
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

    def fits(self, example: Example) -> bool:
        """Return whether all prompts are within `max_length`, the receiver's with at least one token of the answer."""
        return max(len(example["input_ids"]) + 1, *map(len, example["sharer_input_ids"])) <= self.max_length

    def turns(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """Split a row into answers and what precedes them."""
        if "messages" in row or "conversations" in row:
            yield from _chat_turns(row)
        elif "choices" in row:
            yield self._choice_turn(row)
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
        several = len(processor.sharer_tokenizers) > 1
        sharer_ids, sharer_mask, alignment = (inputs[n] if several else [inputs[n]] for n in SHARER_COLUMNS)
        room = max(1, self.max_length - len(prompt_ids))
        answer_ids, *wrong_ids = (
            self._answer_ids(prompt, prompt_ids, chat, separator + answer)[:room]
            for answer in (turn.answer, *turn.wrong_answers)
        )
        return Example(
            input_ids=prompt_ids,
            answer_ids=answer_ids,
            wrong_answer_ids=wrong_ids,
            sharer_input_ids=sharer_ids,
            sharer_attention_mask=sharer_mask,
            sharer_alignment=alignment,
            length=len(prompt_ids) + len(answer_ids),
        )

    def _answer_ids(
        self, prompt: str, prompt_ids: list[int], chat: list[dict[str, Any]] | None, answer: str
    ) -> list[int]:
        """Tokenize an answer as it follows the prompt; `chat` is `None` for plain text."""
        tokenizer = self.processor.tokenizer
        text = answer + (tokenizer.eos_token or "")
        if chat is not None:
            options = {**self.chat_template_kwargs, "add_generation_prompt": False, "tokenize": False}
            conversation = [*chat, {"role": "assistant", "content": answer}]
            whole = str(self.processor.apply_chat_template(conversation, **options))
            # Whitespace that a template writes after the end of a turn is no part of the answer.
            text = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else text
        together = tokenizer(prompt + text, add_special_tokens=chat is None)["input_ids"]
        # A token across the boundary could never be generated.
        crosses_boundary = together[: len(prompt_ids)] != prompt_ids
        if crosses_boundary:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = together[len(prompt_ids) :]
        if not ids:
            raise ValueError("the answer has no tokens.")
        return ids


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
