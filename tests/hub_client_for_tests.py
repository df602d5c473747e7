"""The real client in a process of its own: huggingface_hub reads `HF_ENDPOINT` once, when it is imported."""

import itertools
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import randomize_fuser, tiny_model
from hub_server_for_tests import TOKEN
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

TEXTS = ["hello ships", "The keeper counted ships before breakfast"]


class Failure(NamedTuple):
    """An exception as it is sent between processes; its own class may not be possible to pickle."""

    classes: list[str]
    message: str


class HubClient:
    """Runs this module's functions against a server.

    Args:
        endpoint: Of the server.
        home: For caches.
    """

    def __init__(self, endpoint: str, home: Path) -> None:
        # Xet is another protocol than the Hub's; without it the client uploads and downloads by the Hub's.
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        settings.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
        before = dict(os.environ)
        os.environ.update(settings)
        for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE"):
            os.environ.pop(name, None)
        try:
            self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_impatient)
            self.pool.submit(os.getpid).result(timeout=120)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result, or the [`Failure`]."""
        return self.pool.submit(_outcome, function, args, kwargs).result(timeout=300)


def _impatient() -> None:
    """Let the client retry without waiting and download in small chunks."""
    import huggingface_hub.constants

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
    torch.set_num_threads(1)


def _outcome(function: Any, args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return Failure([base.__name__ for base in type(error).__mro__], str(error))


_PAIR: dict[str, Any] = {}
_SEEDS = itertools.count(1)


def publish_pair(folder: str) -> None:
    """Publish the base models, load them from the Hub and build a fuser for them."""
    from huggingface_hub import HfApi

    from c2c_hf import C2CForCausalLM, C2CProcessor

    for name, kind, tokenizer in (
        ("org/receiver", "llama", byte_level_tokenizer()),
        ("org/sharer", "qwen3", metaspace_tokenizer()),
    ):
        place = Path(folder, name)
        tiny_model(kind, seed=len(name), vocab_size=len(tokenizer)).save_pretrained(place)
        tokenizer.save_pretrained(place)
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=place)
    sizes = {"fuser_hidden_size": 24, "fuser_intermediate_size": 24}
    model = C2CForCausalLM.from_receiver_and_sharers("org/receiver", "org/sharer", **sizes)
    _PAIR["model"] = model
    _PAIR["processor"] = C2CProcessor.from_receiver_and_sharers("org/receiver", "org/sharer")


def change_receiver(folder: str) -> None:
    """Commit other weights to the receiver's repository."""
    from huggingface_hub import HfApi

    place = Path(folder, "changed")
    tiny_model("llama", seed=77, vocab_size=len(byte_level_tokenizer())).save_pretrained(place)
    HfApi().upload_folder(repo_id="org/receiver", folder_path=place)


def write_card(repo_id: str, license: str) -> None:
    """Publish a model card that names a license."""
    from huggingface_hub import HfApi

    content = f"---\nlicense: {license}\n---\n".encode()
    HfApi().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=content)


def push(repo_id: str, again: bool = False, limit: int | None = None, **kwargs: Any) -> str:
    """Publish the fuser, with new weights or the previous ones; files may not grow beyond the limit."""
    if not again:
        randomize_fuser(_PAIR["model"], next(_SEEDS))
    kwargs = {"license": "apache-2.0", **kwargs}
    with _file_size_limit(limit):
        return _PAIR["model"].push_to_hub(repo_id, processor=_PAIR["processor"], **kwargs).commit_url


def train_and_push(folder: str, repo_id: str) -> tuple[str, list[str]]:
    """Train on raw rows and publish with the trainer; returns the card and the names of all files."""
    from datasets import Dataset
    from huggingface_hub import HfApi, ModelCard

    from c2c_hf import C2CTrainer, C2CTrainingArguments

    rows = Dataset.from_list([{"prompt": text, "completion": "ships"} for text in TEXTS])
    args = C2CTrainingArguments(folder, use_cpu=True, max_steps=1, report_to="none", hub_model_id=repo_id)
    trainer = C2CTrainer(_PAIR["model"], args, None, rows, rows, _PAIR["processor"])
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="apache-2.0", datasets=["me/chats"], tags="tiny", revision="trained")
    card = ModelCard(Path(HfApi().hf_hub_download(repo_id, "README.md", revision="trained")).read_text("utf-8"))
    return str(card), sorted(HfApi().list_repo_files(repo_id, revision="trained"))


def answers(repo_id: str | None = None, own_bases: bool = True, limit: int | None = None, **kwargs: Any) -> Any:
    """Return logits and ids of a published fuser; without a name, those of the fuser in memory."""
    from c2c_hf import C2CForCausalLM, C2CProcessor

    model, processor = _PAIR["model"], _PAIR["processor"]
    if repo_id is not None:
        bases = {"receiver": model.receiver, "sharers": list(model.sharers)} if own_bases else {}
        with _file_size_limit(limit):
            model = C2CForCausalLM.from_pretrained(repo_id, **bases, **kwargs)
        processor = C2CProcessor.from_pretrained(repo_id, **kwargs)
    inputs = processor(TEXTS)
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits.numpy(), model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()


class _file_size_limit:
    """Limits the size of files, as a full disk does."""

    def __init__(self, size: int | None) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.size = self.limits[0] if size is None else size

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def __exit__(self, *args: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
