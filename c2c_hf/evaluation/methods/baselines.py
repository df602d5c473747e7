"""Baselines in which receiver and sharer work together without their caches: text-to-text and query routing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...inference.text_to_text import (
    BACKGROUND_BEGINNING,
    background_prefix,
    background_prompt,
    background_request,
)
from ..run_records import Record
from .answerer import Answerer, ContinuationScore, GeneratedAnswer, Method, Query, Seconds, prepend_text


@dataclass
class TextToText(Method):
    """Text-to-text communication: the sharer generates background, the receiver's prompt begins with it.

    Args:
        sharer: Generates the background.
        receiver: Answers.
        max_background_tokens: Maximum length of the background.
    """

    sharer: Answerer
    receiver: Answerer
    max_background_tokens: int = 256
    # A batch may be scored, and then answered.
    _last: tuple[list[Query], list[GeneratedAnswer]] = field(default=([], []), init=False)

    def score(self, queries: Sequence[Query], continuations: Sequence[Sequence[str]]) -> list[list[ContinuationScore]]:
        """Score continuations of the background and the prompt.

        Args:
            queries: The prompts, one batch.
            continuations: Per prompt its continuations, with the delimiter in front.
        """
        extended, _ = self._with_background(queries)
        scores = self.receiver.score(extended, continuations)
        self._add_seconds()
        return scores

    def generate(
        self, queries: Sequence[Query], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[GeneratedAnswer]:
        """Generate an answer behind the background and the prompt; the tokens of both models count.

        Args:
            queries: The prompts, one batch.
            max_new_tokens: Maximum length of an answer.
            stop: Strings at which an answer ends; they are cut off.
        """
        extended, backgrounds = self._with_background(queries)
        answers = self.receiver.generate(extended, max_new_tokens, stop)
        self._add_seconds()
        return [
            GeneratedAnswer(
                answer.text,
                answer.num_tokens + background.num_tokens,
                answer.prompt_tokens + background.prompt_tokens,
            )
            for answer, background in zip(answers, backgrounds, strict=True)
        ]

    def _with_background(self, queries: Sequence[Query]) -> tuple[list[Query], list[GeneratedAnswer]]:
        requests = [self._request(query) for query in queries]
        if requests != self._last[0]:
            self._last = requests, self.sharer.generate(requests, self.max_background_tokens, ("\n",))
        backgrounds = self._last[1]
        extended = [
            Query(
                prepend_text(background_prefix(background.text), query.prompt),
                max_answer_tokens=query.max_answer_tokens,
            )
            for query, background in zip(queries, backgrounds, strict=True)
        ]
        return extended, backgrounds

    @staticmethod
    def _request(query: Query) -> Query:
        if isinstance(query.prompt, str):
            return Query(background_prompt(query.question), context=query.context)
        request = {"role": "user", "content": background_request(query.question)}
        begun = {"role": "assistant", "content": BACKGROUND_BEGINNING}
        return Query([request, begun], continues=True, context=query.context)

    def _add_seconds(self) -> None:
        background, answer = self.sharer.seconds, self.receiver.seconds
        total = background.total + answer.total
        self.seconds = Seconds(total, background.total, 0.0, answer.prefill, answer.decode)


def route_queries(receiver: Mapping[str, Record], sharer: Mapping[str, Record]) -> dict[str, Record]:
    """Query routing: the receiver answers the half of the questions that it is surer of, the sharer the other half.

    Args:
        receiver: Its records by item, with `confidence`.
        sharer: The stronger model's.

    Raises:
        ValueError: The receiver's records have no confidence, as those of generated answers.
    """
    both = sorted(receiver.keys() & sharer.keys())
    failed = {item: "error" in receiver[item] for item in both}
    if any("confidence" not in receiver[item] and not failed[item] for item in both):
        raise ValueError("`methods`: 'routing' compares choices' likelihoods, which generated answers do not have.")
    ordered = sorted(both, key=lambda item: (receiver[item].get("confidence", 0.0), item))
    unsure = set(ordered[: len(ordered) // 2])
    routed = {}
    for item in both:
        chosen = sharer[item] if item in unsure else receiver[item]
        routed[item] = {**chosen, "method": "routing"}
        if item in unsure:
            # The receiver has run, too: its confidence decides.
            own, other = receiver[item]["seconds"], chosen["seconds"]
            routed[item]["seconds"] = {name: own[name] + other[name] for name in own}
    return routed
