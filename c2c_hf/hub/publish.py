"""Publishes a saved fuser on the Hub: its own files and a card in one commit, never a base model's weight."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..checkpoints.fuser_weights import is_own_weight, load_fuser_weights
from ..checkpoints.receiver_adapter import ADAPTER_FOLDER
from ..checkpoints.remote_code import code_files
from ..configuration_c2c import C2CConfig
from .download import check_subfolder
from .licenses import GEMMA_NOTICE
from .model_card import render_model_card

#: Files of a fuser, of a processor and of the tokenizers; what else stands in a folder (checkpoints, logs, optimizer
#: states) stays at home.
_OWN_FILES = re.compile(
    r"config\.json|generation_config\.json|processor_config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    rf"|{ADAPTER_FOLDER}/(adapter_config\.json|adapter_model\.safetensors)"
    r"|(sharer_\d+/)?(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|vocab\.txt|merges\.txt|[\w.-]+\.model|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja)"
)
_TEXTS = ("README.md", "LICENSE", "NOTICE")
_ATTEMPTS = 3
#: Requests that the client does not repeat by itself.
_SENT_ONCE = ("/commit/", "/branch/", "/repos/create")


def publish_fuser(
    folder: str | Path,
    repo_id: str,
    receiver: str | None = None,
    sharers: str | Sequence[str] | None = None,
    card: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    training: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    **upload_kwargs: Any,
) -> CommitInfo:
    """Publish a saved fuser, its processor and its card in one commit.

    Args:
        folder: As saved, by the model and the processor.
        repo_id: `name` or `owner/name`; made if needed.
        receiver: Hub id to record in place of the receiver's name, where that is a local folder.
        sharers: The same for the sharers, one or a list.
        card: The card's text. `None`: the folder's README.md, or where it has none, one that is rendered.
        license: Of the fuser, see [`~base_licenses.fuser_license`]; this and the following are for the rendered card.
        evaluation: A folder of `c2c evaluate`. `None`: the card says that nothing was measured.
        training: How the fuser was trained, field by field. `None`: the card says that this is not recorded.
        datasets: Hub ids of the data it was trained on.
        tags: Further tags.
        **upload_kwargs: `subfolder`, `private`, `token`, `revision`, `create_pr`, `commit_message` and
            `commit_description`, see [`upload_files`].

    Returns:
        The commit.

    Raises:
        ValueError: A base model is a local folder that nobody else has, the license cannot be found out, or the folder
            holds weights that are not the fuser's.
        OSError: There is no saved fuser, or the Hub refuses or does not answer; nothing is committed then.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in publishable_files(folder)}
    config = C2CConfig.from_pretrained(folder)
    wished: list[Any] = [receiver, *([None] * config.num_sharers)]
    if sharers is not None:
        wished[1:] = [sharers] if isinstance(sharers, str) else sharers
    files["config.json"] = _published_config(folder, config, wished)
    if (name := f"{ADAPTER_FOLDER}/adapter_config.json") in files:
        adapter = json.loads((folder / name).read_text(encoding="utf-8"))
        adapter["base_model_name_or_path"] = config.receiver_name_or_path
        files[name] = (json.dumps(adapter, indent=2, sort_keys=True) + "\n").encode()
    rendered_license = None
    if card is None and "README.md" not in files:
        weights = load_fuser_weights(folder, {})
        where = (repo_id, upload_kwargs.get("subfolder"))
        rendered = render_model_card(config, weights, *where, license, evaluation, training, datasets, tags)
        card, rendered_license = str(rendered), rendered.data.to_dict().get("license")
    if card is not None:
        files["README.md"] = card.encode()
    if rendered_license == "gemma":
        files["NOTICE"] = f"{GEMMA_NOTICE}\n".encode()
    return upload_files(files, repo_id, **upload_kwargs)


def _published_config(folder: Path, config: C2CConfig, wished: Sequence[str | None]) -> bytes:
    """Return `config.json` with base models that anyone can load; the configuration itself changes along."""
    if len(wished) != config.num_sharers + 1:
        raise ValueError(f"`sharers`: this fuser has {config.num_sharers} sharers, but got {len(wished) - 1} names.")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    recorded = [config.receiver_name_or_path, *(sharer.name_or_path for sharer in config.sharers)]
    revisions = [config.receiver_revision, *(sharer.revision for sharer in config.sharers)]
    roles = ["receiver", *["sharers"] * config.num_sharers]
    names = [_hub_id(*texts) for texts in zip(roles, wished, recorded, strict=True)]
    # A recorded commit is one of the recorded model's.
    compared = zip(names, recorded, revisions, strict=True)
    kept = [revision if name == old else None for name, old, revision in compared]
    config.receiver_name_or_path, config.receiver_revision = names[0], kept[0]
    for sharer, name, revision in zip(config.sharers, names[1:], kept[1:], strict=True):
        sharer.name_or_path, sharer.revision = name, revision
    changed = {name: config.to_dict()[name] for name in ("receiver_name_or_path", "receiver_revision", "sharers")}
    return (json.dumps({**fields, **changed}, indent=2, sort_keys=True) + "\n").encode()


def _hub_id(role: str, wished: str | None, recorded: str | None) -> str:
    name = recorded if wished is None else wished
    try:
        if name is not None and not os.path.isdir(name):
            validate_repo_id(name)
            return name
    except HFValidationError:
        name = str(name)
    raise ValueError(
        f"`{role}`: the base model {name!r} is no Hub id, so that nobody else could load the fuser; pass the Hub "
        f"id of the same model as `{role}`."
    )


def publishable_files(folder: str | Path) -> list[str]:
    """List what of a saved fuser's folder belongs on the Hub.

    Args:
        folder: With a fuser and, usually, its processor.

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
        # An adapter has names of its own, which PEFT compares with the receiver's.
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
    """Upload a saved fuser in one commit; files of an earlier one that it no longer has are deleted in the same.

    Args:
        files: Path in the repository -> file or content.
        repo_id: `name` or `owner/name`; made if needed.
        subfolder: Where in the repository, for several fusers in one.
        commit_message: Default: `"Upload fuser"`.
        commit_description: Its body.
        private: Of a repository that is made.
        token: Of the Hub. `None`: the one that is stored.
        revision: The branch; made if needed.
        create_pr: Open a pull request in place of writing to the branch.

    Returns:
        The commit.

    Raises:
        OSError: The Hub refuses or does not answer; nothing is committed then.
        ValueError: `subfolder` goes outside the repository, or code would go into it.
    """
    check_subfolder(subfolder)
    if subfolder and any(name.endswith(".py") for name in files):
        raise ValueError(
            "`subfolder` must be None where code travels, since transformers looks for it at the repository's root; "
            f"but got {subfolder!r}."
        )
    api, place = HfApi(token=token), f"{subfolder}/" if subfolder else ""
    for attempt in range(_ATTEMPTS):
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                _make_branch(api, repo_id, revision, create_pr)
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(f"{place}{name}", content) for name, content in files.items()),
                    *(CommitOperationDelete(name) for name in _stale(api, repo_id, revision, place, files)),
                ],
                commit_message=commit_message or "Upload fuser",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        # A failed upload of a large file comes as a RuntimeError around the cause.
        except (HTTPError, RuntimeError) as error:
            # Sending the same again is safe: what has arrived is compared, not committed twice. Of pull requests
            # there would be two.
            if create_pr or attempt == _ATTEMPTS - 1 or not _passes(error):
                raise _explained(error, repo_id) from error
            time.sleep(1)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _make_branch(api: HfApi, repo_id: str, revision: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        # Who may only open pull requests may not make branches: then it has to be there, which the commit finds out.
        if not (create_pr and error.response.status_code == 403):
            raise


def _stale(api: HfApi, repo_id: str, revision: str | None, place: str, files: Mapping[str, Any]) -> list[str]:
    """Name the files of an earlier fuser at the same place, which would be read as part of the new one."""
    present = api.list_repo_files(repo_id, revision=revision)
    code = {path.name for path in Path(__file__).parent.glob("*.py")}
    own = [name.removeprefix(place) for name in present if name.startswith(place)]
    return [f"{place}{name}" for name in own if (_OWN_FILES.fullmatch(name) or name in code) and name not in files]


def _passes(error: BaseException) -> bool:
    """Say whether trying again may help: the server is in trouble, or the connection was cut."""
    if not isinstance(error, HTTPError) or not any(part in _url(error) for part in _SENT_ONCE):
        return False
    return not isinstance(error, HfHubHTTPError) or _status(error) >= 500


def _url(error: HTTPError) -> str:
    if isinstance(error, HfHubHTTPError):
        return str(error.response.url)
    # The transport sets it; an error that comes before there was a request has none, and says so by raising.
    try:
        return str(error.request.url)
    except RuntimeError:
        return ""


def _status(error: BaseException) -> int:
    response: Any = getattr(error, "response", None)
    return 0 if response is None else response.status_code


def _explained(error: BaseException, repo_id: str) -> OSError:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    said = " ".join(str(cause).split()) or type(cause).__name__
    status = _status(cause)
    if status in (401, 403):
        return PermissionError(
            f"`token`: the Hub refused to write to {repo_id!r} ({status}); log in with `hf auth login`, or pass a "
            f"token that may write there. It said: {said}"
        )
    if status in (409, 412):
        return OSError(
            f"`repo_id`: {repo_id!r} was changed by someone else at the same time ({status}), and nothing was "
            f"committed; try again. The Hub said: {said}"
        )
    return OSError(
        f"`repo_id`: uploading to {repo_id!r} failed and nothing was committed; try again, what has arrived is not "
        f"sent twice. The cause: {said}"
    )
