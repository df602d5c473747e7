"""One row of training data -> tokenized examples, one per assistant turn."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..processing_c2c import C2CProcessor
from .collator import SHARER_COLUMNS

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Names of roles in `conversations` rows (OpenHermes-2.5 and other ShareGPT data).
_ROLES = {"human": "user", "gpt": "assistant"}
_COLUMNS = ("input_ids", "answer_ids", "wrong_answer_ids", *SHARER_COLUMNS, "length")

#: Messages in front of an answer, what stands between them in plain text, the answer, and wrong ones.
Turn = tuple[list[dict[str, Any]], str, str, list[str]]


@dataclass
class ExampleMaker:
    """Turns rows into tokenized examples; a function that `datasets` can hash and send to other processes."""

    processor: C2CProcessor
    max_length: int
    answer_format: str
    question_template: str
    plain_text: bool
    chat_template_kwargs: dict[str, Any]
    name: str
    log_dropped: bool = False

    def __call__(self, rows: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Tokenize a batch of rows.

        Raises:
            ValueError: A row is bad; the message names it.
        """
        examples: list[dict[str, Any]] = []
        for position, index in enumerate(indices):
            row = {column: values[position] for column, values in rows.items()}
            try:
                turns = list(self.turns(row))
                made = [self.tokenize(turn, row.get("sharer_context") or None) for turn in turns]
            except ValueError as error:
                known_as = f" (id {row['id']!r})" if row.get("id") is not None else ""
                raise ValueError(f"Row {index + 1}{known_as} of {self.name}: {error}") from error
            examples += made
            if self.log_dropped and not all(example["fits"] for example in made):
                logger.warning(
                    "Row %d of %s is dropped, in whole or in part: a prompt leaves no room in `max_length=%d` tokens.",
                    index + 1,
                    self.name,
                    self.max_length,
                )
        return {column: [example[column] for example in examples] for column in (*_COLUMNS, "fits")}

    def turns(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """Split a row into prompts and answers."""
        if "messages" in row or "conversations" in row:
            yield from _chat_turns(row)
        elif "choices" in row:
            yield self._choice_turn(row)
        else:
            for column in ("prompt", "completion"):
                if not isinstance(row[column], str) or not row[column].strip():
                    raise ValueError(f"`{column}` must be a text that is not empty, but got {row[column]!r:.80}.")
            yield [{"role": "user", "content": row["prompt"]}], "", row["completion"], []

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
        # Plain replacement: a question may contain braces.
        prompt = self.question_template.replace("{choices}", "\n".join(lines)).replace("{question}", question)
        answers = {"letter": LETTERS[: len(choices)], "text": choices, "both": lines}[self.answer_format]
        wrong = [other for other in answers if other != answers[answer]]
        return [{"role": "user", "content": prompt}], " ", answers[answer], wrong

    def tokenize(self, turn: Turn, context: str | None) -> dict[str, Any]:
        """Tokenize one prompt for all models and its answer for the receiver.

        The answer of a chat ends as the receiver's template ends a turn, any other with its end token.
        """
        messages, between, answer, wrong = turn
        processor, options = self.processor, {**self.chat_template_kwargs, "add_generation_prompt": True}
        if self.plain_text or processor.chat_template is None:
            prompt, chat = "\n".join(str(message["content"] or "") for message in messages), None
            if between == "\n":
                prompt, between = prompt + between, ""
            inputs = processor(prompt, sharer_context=context, return_tensors=None)
        else:
            chat, between = messages, ""
            inputs = processor.apply_chat_template(messages, sharer_context=context, return_tensors=None, **options)
            prompt = str(processor.apply_chat_template(messages, tokenize=False, **options))
        ids = inputs["input_ids"]
        several = len(processor.sharer_tokenizers) > 1
        sharers = {name: inputs[name] if several else [inputs[name]] for name in SHARER_COLUMNS}
        longest = max(len(ids) + 1, *(len(sharer_ids) for sharer_ids in sharers["sharer_input_ids"]))
        kept = max(1, self.max_length - len(ids))
        answer_ids, *wrong_ids = (
            self._answer_ids(prompt, ids, chat, between + text)[:kept] for text in (answer, *wrong)
        )
        return {
            "input_ids": ids,
            "answer_ids": answer_ids,
            "wrong_answer_ids": wrong_ids,
            **sharers,
            "length": len(ids) + len(answer_ids),
            "fits": longest <= self.max_length,
        }

    def _answer_ids(
        self, prompt: str, prompt_ids: list[int], chat: list[dict[str, Any]] | None, answer: str
    ) -> list[int]:
        """Tokenize an answer as it follows the prompt, whose messages come where a template wrote it."""
        tokenizer = self.processor.tokenizer
        text = answer + (tokenizer.eos_token or "")
        if chat is not None:
            options = {**self.chat_template_kwargs, "add_generation_prompt": False, "tokenize": False}
            whole = str(
                self.processor.apply_chat_template([*chat, {"role": "assistant", "content": answer}], **options)
            )
            # What a template writes behind the end of a turn is no part of the answer.
            text = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else text
        together = tokenizer(prompt + text, add_special_tokens=chat is None)["input_ids"]
        # A token across the boundary could never be generated.
        split = together[: len(prompt_ids)] != prompt_ids
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if split else together[len(prompt_ids) :]
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
    # Rows of one data set share their columns: those that a message lacks come as None.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in chat:
        message.setdefault("content", "")
    answers = [i for i, message in enumerate(chat) if i > 0 and message["role"] == "assistant" and message["content"]]
    if not answers:
        raise ValueError(f"`{column}` has no assistant turn that answers something, so there is nothing to learn.")
    for index in answers:
        yield chat[:index], "\n", chat[index]["content"], []
