"""`PairSettings`: what processor and model must agree on, carried by both and compared where they meet."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configuration_c2c import MEMORY_GRIDS, MODES, TOKEN_ALIGNMENTS, C2CConfig

_ADVICE = "; build the processor with `C2CProcessor.from_config(model.config)`."
#: Hexadecimal digits of a hash that fit into int64.
_HASH_DIGITS = 15


@dataclass(frozen=True)
class PairSettings:
    """The settings of a receiver and one of its sharers, of a processor or of a model.

    Attributes:
        mode: `"fusion"` or `"memory"`.
        memory_grid: `"receiver"` or `"sharer"`; compared in memory mode.
        memory_sink_tokens: Number of the prompt's first tokens that are never slots; likewise.
        token_alignment: Of the sharer.
        receiver_hash: Of the receiver's vocabulary, see [`~inference.fingerprints.tokenizer_hash`]. `None`: unknown,
            not compared.
        sharer_hash: Of the sharer's vocabulary.
    """

    mode: str
    memory_grid: str
    memory_sink_tokens: int
    token_alignment: str
    receiver_hash: str | None
    sharer_hash: str | None

    def to_tensor(self, batch_size: int) -> torch.Tensor:
        """Encode for a batch: `(batch_size, 6)`, int64, the same in every row."""
        row = [
            MODES.index(self.mode),
            MEMORY_GRIDS.index(self.memory_grid),
            self.memory_sink_tokens,
            TOKEN_ALIGNMENTS.index(self.token_alignment),
            *(-1 if value is None else int(_short(value), 16) for value in (self.receiver_hash, self.sharer_hash)),
        ]
        return torch.tensor([row]).repeat(batch_size, 1)

    @classmethod
    def from_tensor(cls, settings: torch.Tensor) -> "PairSettings":
        """Decode [`PairSettings.to_tensor`], the first digits of the hashes only.

        Raises:
            ValueError: It is something else, or rows differ.
        """
        rows = settings.tolist() if isinstance(settings, torch.Tensor) else settings
        try:
            (mode, grid, sink, alignment, *hashes), *others = rows
            if any(row != rows[0] for row in others):
                raise ValueError("rows differ")
            receiver_hash, sharer_hash = (None if value < 0 else f"{value:0{_HASH_DIGITS}x}" for value in hashes)
            return cls(MODES[mode], MEMORY_GRIDS[grid], sink, TOKEN_ALIGNMENTS[alignment], receiver_hash, sharer_hash)
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"`sharer_settings` must be those of one `C2CProcessor`, but got {rows!r:.80} ({error}); pass the "
                "outputs of one processor on as they are."
            ) from error


def settings_of_config(config: C2CConfig) -> list[PairSettings]:
    """Return what a model with this configuration expects of its processor, per sharer."""
    return [
        PairSettings(
            config.mode,
            config.memory_grid,
            config.memory_sink_tokens,
            sharer.token_alignment,
            config.receiver_tokenizer_hash,
            sharer.tokenizer_hash,
        )
        for sharer in config.sharers
    ]


def check_settings(expected: Sequence[PairSettings], found: Sequence[PairSettings]) -> None:
    """Compare the settings of a processor with those of a model.

    Args:
        expected: Of the model, per sharer.
        found: Of the processor, per sharer.

    Raises:
        ValueError: They differ.
    """
    if len(expected) != len(found):
        raise ValueError(f"The processor has {len(found)} sharers, but the model {len(expected)}{_ADVICE}")
    for index, (own, other) in enumerate(zip(expected, found, strict=True)):
        for name in (
            "mode",
            "token_alignment",
            *(("memory_grid", "memory_sink_tokens") if own.mode == "memory" else ()),
        ):
            if getattr(own, name) != getattr(other, name):
                raise ValueError(
                    f"`{name}` of the processor is {getattr(other, name)!r}, but that of the model is "
                    f"{getattr(own, name)!r}{_ADVICE}"
                )
        for role, one, two in (
            ("the receiver", own.receiver_hash, other.receiver_hash),
            (f"sharer {index}", own.sharer_hash, other.sharer_hash),
        ):
            if one is not None and two is not None and _short(one) != _short(two):
                raise ValueError(
                    f"The processor's vocabulary of {role} has the hash {_short(two)}, but that of the model has "
                    f"{_short(one)}{_ADVICE}"
                )


def _short(value: str) -> str:
    return value[:_HASH_DIGITS]
