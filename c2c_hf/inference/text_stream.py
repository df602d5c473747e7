"""The text of a running `generate` call, piece by piece."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

#: What a decoder writes for a character whose bytes are not complete yet.
_INCOMPLETE = "\ufffd"


class TextStream(StoppingCriteria):
    """Decodes one row while `generate` runs, and stops it at strings or when it is cancelled.

    The pieces joined are the text that the whole answer decodes to: a piece waits until its last character is complete
    and until it cannot be the beginning of a stop string.

    Args:
        tokenizer: Of the model that generates.
        prompt_length: Number of prompt tokens.
        emit: Called with every piece. `None`: the text is collected only.
        stop: Strings that end the text; they are cut off.
        eos_token_ids: Tokens that end the text.
        is_cancelled: Asked after every token whether to stop. `None`: never.

    Attributes:
        text: What was emitted so far.
        num_tokens: Number of generated tokens.
        first_token_time: `time.perf_counter()` when the first token was there; `None` before.
        reached_end: Whether a stop string or a token of `eos_token_ids` came.

    Example:
        ```python
        stream = TextStream(tokenizer, inputs["input_ids"].shape[1], emit=print)
        model.generate(**inputs, stopping_criteria=[stream])
        stream.finish()
        ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        emit: Callable[[str], None] | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Collection[int] = (),
        is_cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.text = ""
        self.num_tokens = 0
        self.first_token_time: float | None = None
        self.reached_end = False
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._emit = emit
        self._stop = tuple(stop)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._is_cancelled = is_cancelled
        self._ids: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Decode the new tokens.

        Args:
            input_ids: `(1, seq_len)`, prompt and answer.
            scores: Not used.
            **kwargs: Not used.

        Returns:
            `(1,)`, bool: whether to stop.
        """
        new_ids = input_ids[0, self._prompt_length + len(self._ids) :].tolist()
        # Where transformers checks one step late, a token may come behind the end.
        if new_ids and not self.reached_end:
            self.first_token_time = self.first_token_time or time.perf_counter()
            self._ids += new_ids
            self.num_tokens = len(self._ids)
            self.reached_end = not self._eos_token_ids.isdisjoint(new_ids)
            self._advance()
        stops = self.reached_end or (self._is_cancelled is not None and self._is_cancelled())
        return torch.full((input_ids.shape[0],), stops, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> str:
        """Emit what was held back, and return the whole text."""
        self._advance(is_final=True)
        return self.text

    def _advance(self, is_final: bool = False) -> None:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        found = [position for position in (text.find(string) for string in self._stop) if position >= 0]
        if found:
            text, self.reached_end = text[: min(found)], True
        elif not is_final:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - max((_overlap(text, string) for string in self._stop), default=0)]
        # Some decoders change earlier text (a space before a full stop): what is out stays as it is.
        piece = text[len(self.text) :]
        if piece and (is_final or text.startswith(self.text)):
            self.text += piece
            if self._emit is not None:
                self._emit(piece)


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
