"""The trained fusers that come with the package, and questions to try them on."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypedDict

from ..checkpoints.download import HUB_KWARGS, SHIPPED_FUSERS, shipped_folder
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .pypi_pair import local_pair


class Question(TypedDict):
    """A multiple-choice question: `answer` is the index of the right choice, `source` the benchmark it is from."""

    id: str
    question: str
    choices: list[str]
    answer: int
    source: str


def shipped_fuser(name: str) -> str:
    """Return the folder of a trained fuser that comes with the package.

    Args:
        name: `"general"` (`mode="fusion"`, trained on general data) or `"memory"` (`mode="memory"`, answers about
            documents).

    Raises:
        ValueError: `name` is neither.
    """
    if name not in SHIPPED_FUSERS:
        raise ValueError(f"`name` must be 'general' or 'memory', but got {name!r}.")
    return str(files("c2c_hf") / "pretrained" / name)


def from_pretrained(
    name_or_path: str,
    receiver: str | None = None,
    sharers: str | Sequence[str] | None = None,
    **model_kwargs: Any,
) -> tuple[C2CForCausalLM, C2CProcessor]:
    r"""Load a trained fuser with its base models, and their processor.

    Args:
        name_or_path: `"general"` or `"memory"`: a fuser that comes with the package, on the pair of [`local_pair`],
            SmolLM2-135M-Instruct and Gemma 3 270M. Else the folder (which comes first where both exist) or Hub id of
            a saved fuser, on the base models that it records.
        receiver: Hub id or folder of the receiver. `None`: as above.
        sharers: The same for the sharers, one or several.
        **model_kwargs: Arguments of [`C2CForCausalLM.from_pretrained`], such as `dtype`.

    Raises:
        ImportError: The pair needs a package of the `demo` extra and is not in the cache either.
        ValueError: The checkpoint or the base models do not fit.
        OSError: A file is missing.

    Example:
        ```python
        model, processor = from_pretrained("memory")
        inputs = processor("Question: Who keeps the lighthouse?\nAnswer:", sharer_context=document)
        out = model.generate(**inputs, max_new_tokens=16)
        ```
    """
    if shipped_folder(name_or_path) is None:
        given = {"receiver": receiver, "sharers": sharers, **model_kwargs}
        hub_kwargs = {name: value for name, value in given.items() if name in HUB_KWARGS}
        return (
            C2CForCausalLM.from_pretrained(name_or_path, **given),
            C2CProcessor.from_pretrained(name_or_path, **hub_kwargs),
        )
    if receiver is None or sharers is None:
        pair = local_pair()
        receiver, sharers = receiver or pair[0], sharers or pair[1]
    folder = shipped_fuser(name_or_path)
    model = C2CForCausalLM.from_pretrained(folder, receiver=receiver, sharers=sharers, **model_kwargs)
    return model, C2CProcessor.from_config(model.config, receiver, sharers)


def questions() -> list[Question]:
    """Return twelve multiple-choice questions of ARC and OpenBookQA."""
    text = files("c2c_hf").joinpath("demo/questions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
