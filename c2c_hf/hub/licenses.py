"""Under which license a fuser may be published, as far as those of its base models decide."""

import re
from collections.abc import Sequence
from typing import NamedTuple

#: What the Gemma Terms of Use ask for beside everything that derives from Gemma.
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"

_PERMISSIVE = ("apache-2.0", "mit")
_GEMMA_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
#: Names of base models -> their license, as the Hub calls it. Only what their own cards say; anything else is asked.
_KNOWN = (
    (r"(^|/)(code)?gemma-(1\.1-)?[27]b|(^|/)gemma-[23]", "gemma"),
    (r"^huggingfacetb/smollm[23]?-", "apache-2.0"),
    (r"^qwen/qwen3-", "apache-2.0"),
    (r"^qwen/qwen2\.5-(0\.5|1\.5|7|14|32)b", "apache-2.0"),
    (r"^mistralai/mistral-7b", "apache-2.0"),
    (r"^allenai/olmo-", "apache-2.0"),
    (r"^eleutherai/pythia-", "apache-2.0"),
    (r"^microsoft/phi-[234]", "mit"),
    (r"^openai-community/gpt2", "mit"),
    (r"^meta-llama/llama-3\.2-", "llama3.2"),
    (r"^meta-llama/(meta-)?llama-3\.1-", "llama3.1"),
    (r"^meta-llama/meta-llama-3-", "llama3"),
)


class BaseLicense(NamedTuple):
    """A base model and its license; `None` where it is not known here."""

    name: str
    license: str | None


def base_license(name: str, model_type: str | None) -> BaseLicense:
    """Look up a base model's license.

    Args:
        name: Its Hub id.
        model_type: Of its configuration: a Gemma is one under any name.
    """
    if model_type in _GEMMA_TYPES:
        return BaseLicense(name, "gemma")
    found = next((known for pattern, known in _KNOWN if re.search(pattern, name.lower())), None)
    return BaseLicense(name, found)


def fuser_license(bases: Sequence[BaseLicense], wished: str | None = None) -> str:
    """Choose a fuser's license: it was trained on the states of all its base models.

    Args:
        bases: Receiver and sharers.
        wished: What the user asks for.

    Raises:
        ValueError: A base model's terms forbid what is wished, or nothing is wished and they do not decide.
    """
    gemma = next((base.name for base in bases if base.license == "gemma"), None)
    if gemma is not None and wished not in (None, "gemma"):
        raise ValueError(
            f"`license` must be 'gemma', since the Gemma terms reach a fuser trained on the states of {gemma}, but "
            f"got {wished!r}."
        )
    if wished is not None:
        return wished
    unknown = [base.name for base in bases if base.license is None]
    if unknown and gemma is None:
        raise ValueError(
            f"`license` must be given, since that of {', '.join(unknown)} is not known here; read the base models' "
            "cards and pass the Hub's name of a license, such as 'apache-2.0'."
        )
    binding = {base.license for base in bases if base.license is not None} - {*_PERMISSIVE}
    if len(binding) > 1 and gemma is None:
        raise ValueError(
            f"`license` must be given, since those of the base models differ: {', '.join(sorted(map(str, binding)))}."
        )
    if gemma is not None:
        return "gemma"
    return str(binding.pop()) if binding else "apache-2.0"


def license_text(license: str, bases: Sequence[BaseLicense]) -> str:
    """Say in a card which terms hold and why."""
    if license == "gemma":
        gemma = ", ".join(base.name for base in bases if base.license == "gemma")
        reason = (
            f" The fuser was trained on the states of {gemma} and is a Model Derivative of Gemma." if gemma else ""
        )
        return (
            f"{GEMMA_NOTICE}.{reason} Its use is restricted by the Gemma Prohibited Use Policy "
            "(ai.google.dev/gemma/prohibited_use_policy). The base models come under their own terms."
        )
    return f"The fuser: `{license}`. The base models come under their own terms, which loading them accepts."
