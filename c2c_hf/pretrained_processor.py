"""`C2CPreTrainedProcessor`: how the tokenizers of a receiver and its sharers are put together, saved and loaded."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from .alignment.token_table import build_token_table, check_choice, same_vocabulary
from .checkpoints.remote_code import write_code
from .configuration_c2c import MODES, TOKEN_ALIGNMENTS
from .hub.download import HUB_KWARGS, fetch_folder
from .inference.fingerprints import tokenizer_hash

if TYPE_CHECKING:
    from typing_extensions import Self

#: What a base model's arguments may say about its tokenizer; the others concern its weights alone.
TOKENIZER_KWARGS = (*HUB_KWARGS, "code_revision", "gguf_file", "tokenizer_type", "trust_remote_code", "use_fast")
#: Code that comes with base models runs when the user asks for it; left open, transformers would ask at the terminal.
WITHOUT_CODE = {"trust_remote_code": False}
#: What is downloaded of a processor.
_PATTERNS = (
    *(PROCESSOR_NAME, "*token*", "vocab.*", "merges.txt", "*.model", "chat_template.*", "additional_chat_templates/*"),
    *("sharer_*/*", "*.py"),
)
#: Written for some tokenizers only, and read whenever they are there: those of an earlier save must go.
OPTIONAL_FILES = ("added_tokens.json", "special_tokens_map.json", CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE)


class C2CPreTrainedProcessor(ProcessorMixin):
    """Tokenizers of a receiver and of its sharers, and how each sharer is aligned.

    Arguments and errors are those of [`C2CProcessor`], which adds what turns texts and chats into batches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sharer_tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
        token_alignment: str | Sequence[str] | None = None,
        add_sharer_bos: bool = True,
        mode: str = "fusion",
        memory_sink_tokens: int = 1,
        unknown: str = "skip",
        partial_characters: str = "skip",
        chat_template: str | None = None,
    ) -> None:
        sharers = [sharer_tokenizers] if isinstance(sharer_tokenizers, PreTrainedTokenizerBase) else sharer_tokenizers
        self.tokenizer = tokenizer
        self.sharer_tokenizers = list(sharers)
        self.token_alignment = token_alignment
        self.add_sharer_bos = add_sharer_bos
        self.mode = mode
        self.memory_sink_tokens = memory_sink_tokens
        self.unknown = unknown
        self.partial_characters = partial_characters
        self._token_tables: list[torch.Tensor | None] | None = None
        for name, candidate in [("tokenizer", tokenizer), *(("sharer_tokenizers", s) for s in self.sharer_tokenizers)]:
            if not isinstance(candidate, PreTrainedTokenizerBase):
                raise TypeError(f"`{name}` must hold tokenizers, got {type(candidate).__name__}.")
        if not self.sharer_tokenizers:
            raise ValueError("`sharer_tokenizers` is empty: give at least one sharer's tokenizer.")
        check_choice("unknown", unknown, ("skip", "unk"))
        check_choice("partial_characters", partial_characters, ("skip", "replace"))
        check_choice("mode", mode, MODES)
        if mode == "memory" and token_alignment is None:
            token_alignment = "span"
        self.token_alignments = self._resolve_alignments(token_alignment)
        if mode == "memory" and set(self.token_alignments) != {"span"}:
            raise ValueError(f"`mode='memory'` needs `token_alignment='span'`, got {self.token_alignments}.")
        if chat_template is not None and chat_template != tokenizer.chat_template:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.chat_template = chat_template

    def _resolve_alignments(self, token_alignment: str | Sequence[str] | None) -> list[str]:
        count = len(self.sharer_tokenizers)
        wanted = [token_alignment] * count if isinstance(token_alignment, str | None) else list(token_alignment)
        if len(wanted) != count:
            raise ValueError(
                f"`token_alignment` names {len(wanted)} alignments for {count} sharers: give one per sharer."
            )
        resolved = []
        for index, (alignment, sharer) in enumerate(zip(wanted, self.sharer_tokenizers, strict=True)):
            if alignment is not None:
                check_choice("token_alignment", alignment, TOKEN_ALIGNMENTS)
            same = alignment in (None, "identity") and same_vocabulary(self.tokenizer, sharer)
            if alignment == "identity" and not same:
                raise ValueError(
                    f"`token_alignment='identity'` needs one vocabulary, but the receiver's has {len(self.tokenizer)} "
                    f"tokens and that of sharer {index} {len(sharer)}, or other ids: use 'span', 'first' or 'longest'."
                )
            alignment = alignment or ("identity" if same else "span")
            if alignment == "span" and not (self.tokenizer.is_fast and sharer.is_fast):
                slow = self.tokenizer if not self.tokenizer.is_fast else sharer
                raise ValueError(
                    "`token_alignment='span'` follows character offsets, which the slow tokenizer "
                    f"{type(slow).__name__} lacks: use a fast tokenizer, or 'first' or 'longest'."
                )
            resolved.append(alignment)
        return resolved

    @classmethod
    def from_receiver_and_sharers(
        cls,
        receiver: str | os.PathLike | PreTrainedTokenizerBase,
        sharers: str | os.PathLike | PreTrainedTokenizerBase | Sequence[str | os.PathLike | PreTrainedTokenizerBase],
        token_alignment: str | Sequence[str] | None = None,
        receiver_kwargs: Mapping[str, Any] | None = None,
        sharer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        **processor_kwargs: Any,
    ) -> Self:
        """Build from Hub ids, folders or tokenizers.

        Args:
            receiver: Id, folder or tokenizer of the receiver.
            sharers: The same, one or several.
            token_alignment: As in the constructor.
            receiver_kwargs: Arguments of the receiver's `from_pretrained`; those about weights are left aside.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            processor_kwargs: Further arguments of the constructor.

        Raises:
            ValueError: If there is not one `sharer_kwargs` per sharer, and as the constructor.
        """
        names = [sharers] if isinstance(sharers, str | os.PathLike | PreTrainedTokenizerBase) else list(sharers)
        per_sharer = [sharer_kwargs] * len(names) if isinstance(sharer_kwargs, Mapping | None) else list(sharer_kwargs)
        if len(per_sharer) != len(names):
            raise ValueError(f"`sharer_kwargs` has {len(per_sharer)} entries for {len(names)} sharers.")
        tokenizers = [_load(name, kwargs) for name, kwargs in zip(names, per_sharer, strict=True)]
        return cls(_load(receiver, receiver_kwargs), tokenizers, token_alignment, **processor_kwargs)

    @property
    def token_tables(self) -> list[torch.Tensor | None]:
        """One table `(receiver vocabulary,)` per sharer aligned by `first` or `longest`, else `None`; built once."""
        if self._token_tables is None:
            self._token_tables = [
                build_token_table(self.tokenizer, sharer, alignment, self.unknown, self.partial_characters)
                if alignment in ("first", "longest")
                else None
                for sharer, alignment in zip(self.sharer_tokenizers, self.token_alignments, strict=True)
            ]
        return self._token_tables

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Name what `ProcessorMixin` saves by itself: the receiver's tokenizer. The sharers' number is not fixed."""
        return ["tokenizer"]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The receiver's chat template."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, chat_template: str | dict[str, str] | None) -> None:
        self.tokenizer.chat_template = chat_template

    def to_dict(self) -> dict[str, Any]:
        """Return what `processor_config.json` holds."""
        return {
            "processor_class": type(self).__name__,
            "num_sharers": len(self.sharer_tokenizers),
            "token_alignment": list(self.token_alignments),
            "add_sharer_bos": self.add_sharer_bos,
            "mode": self.mode,
            "memory_sink_tokens": self.memory_sink_tokens,
            "unknown": self.unknown,
            "partial_characters": self.partial_characters,
            "tokenizer_hashes": [tokenizer_hash(t) for t in (self.tokenizer, *self.sharer_tokenizers)],
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        with_code: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Save the receiver's tokenizer into a folder, each sharer's into `sharer_0`, ..., and the configuration.

        The files are written beside their places first and moved there when all are complete, so that a save which is
        interrupted leaves what stood there before. Files of others in the folder, a fuser's say, stay as they are.

        Args:
            save_directory: The folder; made if needed.
            push_to_hub: Upload the processor afterwards, alone; with its fuser, see [`C2CForCausalLM.push_to_hub`].
            with_code: Save this package's code beside it, for `AutoProcessor.from_pretrained(...,
                trust_remote_code=True)` where the package is not installed.
            kwargs: `repo_id` (default: the folder's name) and arguments of [`push_to_hub`].

        Returns:
            The path of `processor_config.json`.

        Raises:
            ValueError: `save_directory` is a file.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, but {str(target)!r} is a file.")
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            super().save_pretrained(staging)
            if type(self)._auto_class is None:
                write_code(staging, PROCESSOR_NAME, {"AutoProcessor": type(self)} if with_code else None)
            for index, sharer in enumerate(self.sharer_tokenizers):
                sharer.save_pretrained(staging / f"sharer_{index}")
            _move_into_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if push_to_hub:
            # Not the mixin's own upload, which would be handed the staging folder.
            self.push_to_hub(kwargs.pop("repo_id", target.resolve().name), **kwargs)
        return [str(target / PROCESSOR_NAME)]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        **kwargs: Any,
    ) -> Self:
        """Load a saved processor from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: Arguments of the Hub (`revision`, `token`, ...), `trust_remote_code`, or fields to override.

        Raises:
            ValueError: If there is no complete processor, or `subfolder` goes outside the repository.
            TypeError: For an unknown argument.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        folder = fetch_folder(pretrained_model_name_or_path, _PATTERNS, hub)
        config, _ = cls.get_processor_dict(folder)
        tokenizer_kwargs = {key: kwargs.pop(key) for key in TOKENIZER_KWARGS if key in kwargs}
        fields = (
            *("token_alignment", "add_sharer_bos", "mode", "memory_sink_tokens", "unknown"),
            "partial_characters",
        )
        if unexpected := [key for key in kwargs if key not in fields and not key.startswith("_")]:
            raise TypeError(f"`from_pretrained` got unknown arguments: {', '.join(map(repr, unexpected))}.")
        if not isinstance(config.get("num_sharers"), int):
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds no complete C2CProcessor (processor_config.json with "
                "`num_sharers`): build one with `C2CProcessor.from_receiver_and_sharers`."
            )
        folders = [folder]
        for index in range(config["num_sharers"]):
            folders.append(folder / f"sharer_{index}")
            if not folders[-1].is_dir():
                raise ValueError(
                    f"`{pretrained_model_name_or_path}` lacks the sharer's tokenizer folder `sharer_{index}`."
                )
        tokenizer_kwargs = {**WITHOUT_CODE, **tokenizer_kwargs}
        receiver, *sharers = (AutoTokenizer.from_pretrained(place, **tokenizer_kwargs) for place in folders)
        saved_hashes = config.get("tokenizer_hashes") or [None] * len(folders)
        for place, tokenizer, saved in zip(folders, (receiver, *sharers), saved_hashes, strict=False):
            if saved is not None and tokenizer_hash(tokenizer) != saved:
                raise ValueError(
                    f"`{pretrained_model_name_or_path}`: the vocabulary in {place.name!r} is not the one that was "
                    f"saved, whose hash is {saved}; download or save the processor anew."
                )
        values: dict[str, Any] = {
            key: kwargs.get(key, config.get(key)) for key in fields if key in kwargs or key in config
        }
        return cls(receiver, sharers, **values)


def _load(
    name: str | os.PathLike | PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None
) -> PreTrainedTokenizerBase:
    if isinstance(name, PreTrainedTokenizerBase):
        return name
    own = {key: value for key, value in (kwargs or {}).items() if key in TOKENIZER_KWARGS}
    return AutoTokenizer.from_pretrained(name, **{**WITHOUT_CODE, **own})


def _move_into_place(staging: Path, target: Path) -> None:
    """Move complete files and folders to their places; if that fails, what they replaced comes back."""
    # Without its configuration a folder holds no processor, so that goes first and comes last.
    written = sorted((path.name for path in staging.iterdir()), key=lambda name: name == PROCESSOR_NAME)
    stale = [path.name for path in target.iterdir() if re.fullmatch("sharer_[0-9]+", path.name)]
    replaced = staging / "replaced"
    replaced.mkdir()
    moved = []
    try:
        for name in dict.fromkeys([*reversed(written), *stale, *OPTIONAL_FILES]):
            if os.path.lexists(target / name):
                os.replace(target / name, replaced / name)
        for name in written:
            os.replace(staging / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.replace(target / name, staging / name)
        for path in replaced.iterdir():
            os.replace(path, target / path.name)
        raise
