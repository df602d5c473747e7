"""`C2CSavingMixin`: how a fuser is saved and published, without its base models."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .checkpoints.absent_sharer import AbsentSharer
from .checkpoints.fuser_weights import is_own_weight
from .checkpoints.receiver_adapter import ADAPTER_FOLDER, has_adapter, save_adapter
from .checkpoints.remote_code import write_code
from .hub.publish import publish_fuser
from .inference.rotary import describe_rotations
from .processing_c2c import C2CProcessor

#: What `save_pretrained(push_to_hub=True)` hands on.
_PUSHING = ("repo_id", "token", "private", "revision", "create_pr", "commit_message", "commit_description", "license")


class C2CSavingMixin(PreTrainedModel):
    """Writes configuration and fuser, and publishes them with processor and card."""

    receiver: PreTrainedModel
    sharers: Any
    rotations: Any

    def _own_state_dict(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        items = (self.state_dict() if state_dict is None else state_dict).items()
        return {name: value for name, value in items if is_own_weight(name)}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        is_main_process: bool = True,
        with_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save configuration and fuser, never a base model's weight; the receiver's PEFT adapter, if it has one.

        The files are written beside their places first and moved there when all are complete, so that a save which is
        interrupted leaves what stood there before.

        Args:
            save_directory: The folder; made if needed.
            state_dict: Weights to save in place of the model's own; those of base models are left out.
            push_to_hub: Upload afterwards, see [`push_to_hub`].
            is_main_process: Only the main process writes.
            with_code: Save this package's code beside them, so that `AutoModelForCausalLM.from_pretrained(...,
                trust_remote_code=True)` works where the package is not installed.
            **kwargs: Arguments of transformers' `save_pretrained`, such as `max_shard_size`; with `push_to_hub` those
                of [`push_to_hub`] as well.

        Raises:
            ValueError: `save_directory` is a file.
            OSError: The disk is full.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, but {str(target)!r} is a file.")
        pushing = {key: kwargs.pop(key) for key in _PUSHING if key in kwargs}
        if is_main_process:
            if self.config.mode == "memory" and not any(isinstance(s, AbsentSharer) for s in self.sharers):
                # Where the sharers are not, nothing else tells.
                for sharer, found in zip(self.config.sharers, self.rotations()[1:], strict=True):
                    sharer.rotations = describe_rotations(found)
            target.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
            try:
                self._write(staging, self._own_state_dict(state_dict), with_code, kwargs)
                if has_adapter(self.receiver):
                    save_adapter(self.receiver, staging / ADAPTER_FOLDER)
                files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
                found = {*target.glob("model*.safetensors*"), *target.glob(f"{ADAPTER_FOLDER}/adapter_*")}
                for file in sorted(files, key=lambda file: file.suffix != ".safetensors"):
                    (target / file).parent.mkdir(exist_ok=True)
                    (staging / file).replace(target / file)
                for path in found - {target / file for file in files}:
                    path.unlink()
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            if push_to_hub:
                repo_id = pushing.pop("repo_id", target.resolve().name)
                self.push_to_hub(repo_id, with_code=with_code, **pushing)

    def _write(
        self, folder: Path, state_dict: dict[str, torch.Tensor], with_code: bool, kwargs: dict[str, Any]
    ) -> None:
        try:
            super().save_pretrained(folder, state_dict=state_dict, **kwargs)
        except SafetensorError as error:
            # Its way to say that the disk is full.
            raise OSError(f"The fuser could not be written ({error}); what was there before is unchanged.") from error
        # Code that came with a checkpoint transformers writes by itself.
        if type(self)._auto_class is None:
            classes = {"AutoConfig": type(self.config), "AutoModelForCausalLM": type(self)}
            write_code(folder, CONFIG_NAME, classes if with_code else None)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: C2CProcessor | None = None,
        tags: Sequence[str] | str | None = None,
        with_code: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> CommitInfo:
        """Publish configuration, fuser, processor and model card in one commit; never a base model's weight.

        Args:
            repo_id: `name` or `owner/name`; made if needed.
            processor: Of the pair. `None`: made from the base models' names, as
                [`C2CProcessor.from_receiver_and_sharers`] does.
            tags: Further tags of the card.
            with_code: Let this package's code travel, see [`save_pretrained`].
            max_shard_size: Largest size of a weights file.
            **kwargs: `receiver` and `sharers`, Hub ids to record in place of local folders; `card`, or what one is
                made of: `license`, `evaluation`, `training`, `datasets`; where it goes: `subfolder`, `private`,
                `token`, `revision` (a branch), `create_pr`, `commit_message`, `commit_description`. See
                [`~hub.publish_fuser`].

        Returns:
            The commit.

        Raises:
            ValueError: A base model is a local folder that nobody else has, the license cannot be found out, or an
                argument is unknown.
            OSError: The Hub refuses or does not answer, or the disk is full; nothing is committed then.
        """
        if processor is None:
            names: list[Any] = [
                self.config.receiver_name_or_path,
                *(sharer.name_or_path for sharer in self.config.sharers),
            ]
            if None in names:
                raise ValueError("`processor` must be given where a base model has no name to find its tokenizer by.")
            processor = C2CProcessor.from_receiver_and_sharers(names[0], names[1:], self.config.token_alignments)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, with_code=with_code, max_shard_size=max_shard_size)
            processor.save_pretrained(folder, with_code=with_code)
            tags = [tags] if isinstance(tags, str) else tags or ()
            return publish_fuser(folder, repo_id, tags=tags, **kwargs)
