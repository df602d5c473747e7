"""Cache enrichment by an oracle (arXiv 2510.03215, table 1): examples act through the question's states alone.

The receiver prefills examples and question; only the question's slice of that cache is kept, as long as without them.
This is C2C of the receiver with itself, whose fuser puts the sharer's states in the place of the receiver's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...checkpoints.receiver_adapter import adapter_disabled
from ...configuration_c2c import C2CConfig, SharerConfig
from ...fusers.c2c import C2CFuser, FuserPart
from ...modeling_c2c import C2CForCausalLM
from ...processing_c2c import C2CProcessor
from .answerer import PromptBatch, Query
from .c2c_answerer import C2CAnswerer


class ReplacingFuser(C2CFuser):
    """Replaces the receiver's states by the sharer's, which has the same layers; no weight of it is used."""

    def forward(self, part: FuserPart, sharer_states: torch.Tensor, receiver_states: torch.Tensor) -> torch.Tensor:
        """Return the difference of the states."""
        return sharer_states.to(receiver_states) - receiver_states


@dataclass
class OracleEnrichment(C2CAnswerer):
    """The receiver answers from the states that its question has behind examples.

    Args:
        num_examples: Number of the query's examples in front of the question.
    """

    num_examples: int = 0

    def tokenize(self, queries: Sequence[Query], strip: bool) -> PromptBatch:
        """Tokenize prompts for the receiver, and once more with the examples in front.

        Args:
            queries: The prompts, one batch.
            strip: Whether spaces at the end of plain prompts are removed.
        """
        batch = super().tokenize(
            [replace(query, context=query.examples_text(self.num_examples)) for query in queries], strip
        )
        # Both texts end with the same tokens, also where several tokens make one character, which spans do not part.
        (ids,), (alignment,) = batch.sharer_input_ids, batch.sharer_alignment
        width = min(ids.shape[1], alignment.shape[1])
        is_same = (ids[:, -width:] == batch.input_ids[:, -width:]) & batch.attention_mask[:, -width:].bool()
        is_same = is_same.flip(1).cumprod(1).flip(1).bool()
        # The last token is never fused.
        is_same[:, -1] = False
        alignment = alignment.clone()
        columns = torch.arange(ids.shape[1] - width, ids.shape[1], device=ids.device)
        alignment[:, -width:] = torch.where(is_same, columns, alignment[:, -width:])
        return replace(batch, sharer_alignment=[alignment])

    @contextmanager
    def _inference(self, batch: PromptBatch, queries: Sequence[Query]) -> Iterator[dict[str, Any]]:
        with adapter_disabled(self.c2c_model.receiver), super()._inference(batch, queries) as inputs:
            yield inputs

    @contextmanager
    def _gate_weights_recorded(self, batch: PromptBatch) -> Iterator[None]:
        # There are no gates to learn anything from.
        yield


def build_oracle(receiver: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_examples: int) -> OracleEnrichment:
    """Build the receiver's pair with itself.

    Args:
        receiver: The receiver.
        tokenizer: Its tokenizer.
        num_examples: Number of examples in front of a question.

    Raises:
        ValueError: The receiver's keys are rotated in an unknown way, so that a slice cannot move to another position.
    """
    itself = SharerConfig(config=receiver.config, token_alignment="span", fuser_hidden_size=1, num_fuser_layers=2)
    itself.fuser_intermediate_size = 1
    config = C2CConfig(
        receiver_config=receiver.config,
        sharers=[itself],
        # The slice moves from behind the examples to the beginning.
        unrotate_keys=True,
        # Open gates.
        fuser_initialization="zero_output",
    )
    model = C2CForCausalLM(config, receiver, [receiver])
    model.fuser = nn.ModuleList([ReplacingFuser(config, config.sharers[0])]).to(receiver.device)
    model.rotations()
    processor = C2CProcessor(tokenizer, tokenizer, token_alignment="span")
    return OracleEnrichment(model.eval(), processor, num_examples=num_examples)
