"""States that sharers have read elsewhere: those of the right sharer, of the right text."""

from collections.abc import Sequence
from typing import TypeAlias

from ..configuration_c2c import C2CConfig
from .prefill import SharerCache, cached_states
from .sharer_inputs import SharerText

#: A state where there is one sharer, else one or `None` per sharer.
GivenStates: TypeAlias = SharerCache | Sequence[SharerCache | None]


def states_per_sharer(states: GivenStates | None, num_sharers: int) -> list[SharerCache | None]:
    """Return one state or `None` per sharer.

    Raises:
        ValueError: Their number is wrong.
        TypeError: They are something else.
    """
    if states is None:
        return [None] * num_sharers
    values: list[SharerCache | None] = [states] if isinstance(states, SharerCache) else list(states)
    if len(values) != num_sharers:
        raise ValueError(f"`sharer_caches` must hold one state per sharer ({num_sharers}), but got {len(values)}.")
    for value in values:
        if value is not None and not isinstance(value, SharerCache):
            raise TypeError(f"`sharer_caches` must hold `SharerCache`, but got {type(value).__name__}.")
    return values


def give_states(config: C2CConfig, texts: Sequence[SharerText], states: GivenStates | None) -> None:
    """Put states in place of reading; each text then carries its own.

    Args:
        config: Records which sharers the fuser was made for.
        texts: What the sharers would read.
        states: What they have read, or `None`.

    Raises:
        ValueError: A state is that of another sharer or another text, or answers are to be fused, too.
    """
    for index, (text, state) in enumerate(zip(texts, states_per_sharer(states, len(texts)), strict=True)):
        if state is None:
            continue
        if config.fuse_response:
            raise ValueError(
                "`sharer_caches` must be None with `fuse_response=True`, where sharers read the answer too."
            )
        _check_source(config, index, state)
        _check_text(index, text, state)
        # What happens to the cache of this pass must not happen to the caller's state.
        text.state = state.repeat_interleave(1)


def _check_source(config: C2CConfig, index: int, state: SharerCache) -> None:
    recorded = {
        "weights' fingerprint": (config.sharers[index].fingerprint, state.source and state.source.fingerprint),
        "revision": (config.sharers[index].revision, state.source and state.source.revision),
        "vocabulary hash": (config.sharers[index].tokenizer_hash, state.source and state.source.tokenizer_hash),
    }
    for field, (saved, found) in recorded.items():
        if saved is not None and found is not None and saved != found:
            raise ValueError(
                f"`sharer_caches`: sharer {index} of this fuser has {field} {saved}, but the state comes from one "
                f"with {found}; let the sharer that the fuser was trained with read the text."
            )
    shapes = [[keys.shape[1], keys.shape[3], values.shape[3]] for keys, values in cached_states(state.cache)]
    expected_shapes = config.sharers[index].layer_shapes or shapes
    if shapes != [list(shape) for shape in expected_shapes]:
        raise ValueError(
            f"`sharer_caches`: the state of sharer {index} has layers of shapes {shapes}, but the fuser reads "
            f"{expected_shapes}; let the right sharer read the text."
        )


def _check_text(index: int, text: SharerText, state: SharerCache) -> None:
    # How far the sharer has to have read: what lies behind the last position that is read makes no difference.
    length = int(text.alignment.max()) + 1
    device = state.input_ids.device
    ids, mask = text.input_ids[:, :length].to(device), text.attention_mask[:, :length].to(device)
    if state.common_prefix(ids, mask) < length:
        raise ValueError(
            f"`sharer_caches`: sharer {index} has read another text, or another batch of texts, than "
            "`sharer_input_ids` and `sharer_attention_mask` name; let it read these."
        )
