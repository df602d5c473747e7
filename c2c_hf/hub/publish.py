"""Publish a saved fuser on the Hub: its own files and a model card in one commit, never a base model's weight."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..checkpoints.download import check_subfolder
from ..checkpoints.fuser_weights import is_own_weight, load_fuser_weights
from ..checkpoints.receiver_adapter import ADAPTER_FOLDER, ADAPTER_FOLDERS, SHARER_ADAPTER_FOLDER
from ..checkpoints.remote_code import CODE_FILES, code_files
from ..configuration_c2c import C2CConfig
from .licenses import GEMMA_NOTICE, base_licenses
from .model_card import render_model_card
from .training_run import TrainingRun

#: Files of a fuser, of a processor and of the tokenizers; all others in a folder (checkpoints, logs, optimizer
#: states) are not uploaded.
_OWN_FILES = re.compile(
    r"config\.json|generation_config\.json|processor_config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    rf"|({ADAPTER_FOLDERS})/(adapter_config\.json|adapter_model\.safetensors)"
    r"|(sharer_\d+/)?(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|vocab\.txt|merges\.txt|[\w.-]+\.model|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja)"
)
_TEXTS = ("README.md", "LICENSE", "NOTICE")


def publish_fuser(
    folder: str | Path,
    repo_id: str,
    receiver: str | None = None,
    sharers: str | Sequence[str] | None = None,
    card: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    training: Mapping[str, object] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    subfolder: str | None = None,
    token: str | bool | None = None,
    **upload_kwargs: Any,
) -> CommitInfo:
    """Publish a saved fuser, its processor and its model card in one commit.

    Args:
        folder: A folder saved by the model and the processor.
        repo_id: `name` or `owner/name`; made if needed.
        receiver: Hub id to record in place of the receiver's name, where that is a local folder.
        sharers: The same for the sharers, one or a list.
        card: The card's text. `None`: the folder's README.md, or a card that is rendered if it has none.
        license: Of the fuser, see [`~hub.licenses.fuser_license`]; this and the following four are for the rendered
            card, see [`~hub.model_card.render_model_card`], which also takes the folder's `training_run.json`.
        evaluation: A folder of `c2c evaluate`.
        training: How the fuser was trained, field by field.
        datasets: Hub ids of the training data.
        tags: Further tags.
        subfolder: Folder in the repository, for several fusers in one.
        token: Of the Hub. `None`: the stored one.
        **upload_kwargs: `private`, `revision`, `create_pr`, `commit_message` and `commit_description`, see
            [`upload_files`].

    Returns:
        The commit.

    Raises:
        ValueError: A base model is a local folder, the license cannot be determined, or the folder holds weights that
            are not the fuser's.
        OSError: There is no saved fuser, or the Hub refuses ([`~huggingface_hub.errors.HfHubHTTPError`]).
        HTTPError: The Hub does not answer ([`~huggingface_hub.errors.HTTPError`]).
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in publishable_files(folder)}
    config = C2CConfig.from_pretrained(folder)
    wished: Sequence[str | None] = [None] * config.num_sharers
    if sharers is not None:
        wished = [sharers] if isinstance(sharers, str) else sharers
    files["config.json"] = _published_config(folder, config, receiver, wished)
    adapted = {SHARER_ADAPTER_FOLDER.format(i): sharer.name_or_path for i, sharer in enumerate(config.sharers)}
    for adapter_folder, base in {ADAPTER_FOLDER: config.receiver_name_or_path, **adapted}.items():
        if (name := f"{adapter_folder}/adapter_config.json") in files:
            adapter = json.loads((folder / name).read_text(encoding="utf-8"))
            files[name] = _as_json({**adapter, "base_model_name_or_path": base})
    bases = base_licenses(config, token)
    if card is None and "README.md" not in files:
        weights = load_fuser_weights(folder, {})
        about = (repo_id, subfolder, license, evaluation, training, datasets, tags, TrainingRun.load(folder))
        card = str(render_model_card(config, weights, bases, *about))
    if card is not None:
        files["README.md"] = card.encode()
    if "gemma" in (base.license for base in bases):
        files["NOTICE"] = _with_gemma_notice(folder / "NOTICE")
    return upload_files(files, repo_id, subfolder=subfolder, token=token, **upload_kwargs)


def _published_config(folder: Path, config: C2CConfig, receiver: str | None, sharers: Sequence[str | None]) -> bytes:
    """Return the content of `config.json` with the base models' Hub ids, which are recorded in `config` as well."""
    if len(sharers) != config.num_sharers:
        raise ValueError(f"`sharers`: this fuser has {config.num_sharers} sharers, but got {len(sharers)} names.")
    receiver_id = _hub_id("receiver", receiver, config.receiver_name_or_path)
    if receiver_id != config.receiver_name_or_path:
        # A recorded commit belongs to the recorded model.
        config.receiver_name_or_path, config.receiver_revision = receiver_id, None
    for sharer, wished in zip(config.sharers, sharers, strict=True):
        sharer_id = _hub_id("sharers", wished, sharer.name_or_path)
        if sharer_id != sharer.name_or_path:
            sharer.name_or_path, sharer.revision = sharer_id, None
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = {name: config.to_dict()[name] for name in ("receiver_name_or_path", "receiver_revision", "sharers")}
    return _as_json({**fields, **changed})


def _hub_id(role: str, wished: str | None, recorded: str | None) -> str:
    name = recorded if wished is None else wished
    try:
        if name is not None and not os.path.isdir(name):
            validate_repo_id(name)
            return name
    except HFValidationError:
        pass
    raise ValueError(
        f"`{role}`: the base model {name!r} is not a Hub id, so the fuser could not be loaded elsewhere; pass the Hub "
        f"id of the same model as `{role}`."
    )


def _with_gemma_notice(path: Path) -> bytes:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return (text if GEMMA_NOTICE in text else f"{text}{GEMMA_NOTICE}\n").encode()


def _as_json(fields: Mapping[str, object]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def publishable_files(folder: str | Path) -> list[str]:
    """List the files of a saved fuser's folder that are uploaded.

    Args:
        folder: Of a fuser and, usually, its processor.

    Returns:
        Paths inside the folder, sorted.

    Raises:
        OSError: There is no saved fuser.
        ValueError: A weights file holds weights that are not the fuser's.
    """
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = {name for name in found if _OWN_FILES.fullmatch(name) or name in _TEXTS}
    weights = [name for name in names if name.endswith(".safetensors")]
    if "config.json" not in names or not weights:
        raise OSError(f"`folder`: {str(folder)!r} holds no saved fuser (config.json and model.safetensors).")
    for name in weights:
        # An adapter's weights have other names, which PEFT compares with the receiver's.
        if "/" not in name:
            _check_weights(folder / name)
    return sorted(names | code_files(folder))


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, "pt") as file:
            foreign = [name for name in file.keys() if not is_own_weight(name)]  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is truncated or no safetensors file ({error}); save it anew.") from error
    if foreign:
        raise ValueError(
            f"{path.name} holds weights that are not a fuser's ({foreign[0]}, ...), and base models are not published "
            "with it; save the model with `save_pretrained`."
        )


def upload_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    subfolder: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a saved fuser in one commit, which also deletes files of an earlier fuser that it does not have.

    Args:
        files: Path in the repository -> file or content.
        repo_id: `name` or `owner/name`; made if needed.
        subfolder: Folder in the repository, for several fusers in one.
        commit_message: Default: `"Upload fuser"`.
        commit_description: Its body.
        private: Whether a new repository is private.
        token: Of the Hub. `None`: the stored one.
        revision: The branch; made if needed.
        create_pr: Open a pull request instead of writing to the branch.

    Returns:
        The commit.

    Raises:
        ValueError: `subfolder` goes outside the repository, or it would contain code.
        OSError: The Hub refuses ([`~huggingface_hub.errors.HfHubHTTPError`]); nothing is committed.
        HTTPError: The Hub does not answer ([`~huggingface_hub.errors.HTTPError`]).
    """
    check_subfolder(subfolder)
    if subfolder and any(name.endswith(".py") for name in files):
        raise ValueError(
            "`subfolder` must be None with `with_code=True`, since transformers looks for code at the root of a "
            f"repository, but got {subfolder!r}."
        )
    api, place = HfApi(token=token), f"{subfolder}/" if subfolder else ""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    present = [
        name.removeprefix(place) for name in api.list_repo_files(repo_id, revision=revision) if name.startswith(place)
    ]
    # Files of an earlier fuser in the same place would be loaded as parts of the new one.
    stale = [name for name in present if (_OWN_FILES.fullmatch(name) or name in CODE_FILES) and name not in files]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(f"{place}{name}", content) for name, content in files.items()),
            *(CommitOperationDelete(f"{place}{name}") for name in stale),
        ],
        commit_message=commit_message or "Upload fuser",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
