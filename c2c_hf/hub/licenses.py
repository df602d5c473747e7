"""Under which license a fuser may be published, as far as the licenses of its base models decide."""

from collections.abc import Sequence
from typing import NamedTuple

from huggingface_hub import model_info
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from ..configuration_c2c import C2CConfig

#: The sentence that the Gemma Terms of Use require beside everything that derives from Gemma.
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"

_PERMISSIVE = ("apache-2.0", "mit")
_GEMMA_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")


class BaseLicense(NamedTuple):
    """The license of a base model.

    Attributes:
        name: The model's Hub id.
        license: As the Hub abbreviates it, such as `"apache-2.0"`; `None` if the model's card names none, or one
            without an abbreviation.
    """

    name: str
    license: str | None


def base_licenses(config: C2CConfig, token: str | bool | None = None) -> list[BaseLicense]:
    """Read the licenses of receiver and sharers from their cards on the Hub.

    Args:
        config: Names the pair by Hub ids.
        token: Of the Hub. `None`: the stored one.
    """
    bases = [(config.receiver_name_or_path, config.receiver_config)]
    bases += [(sharer.name_or_path, sharer.config) for sharer in config.sharers]
    licenses = []
    for name, base_config in bases:
        # A copy of a Gemma model under another name comes under its terms, whatever the card of the copy says.
        is_gemma = getattr(base_config, "model_type", None) in _GEMMA_TYPES
        licenses.append(BaseLicense(str(name), "gemma" if is_gemma else _card_license(str(name), token)))
    return licenses


def _card_license(name: str, token: str | bool | None) -> str | None:
    try:
        card_data = model_info(name, token=token).card_data
    except (HTTPError, OfflineModeIsEnabled):
        # No such model, no access to it, or no answer: the user is asked for the license.
        return None
    license = None if card_data is None else card_data.license
    return license if isinstance(license, str) and license not in ("other", "unknown") else None


def fuser_license(bases: Sequence[BaseLicense], wished: str | None = None) -> str:
    """Choose the license of a fuser, which was trained on the states of all its base models.

    Args:
        bases: Receiver and sharers.
        wished: The license that the user asks for.

    Raises:
        ValueError: A base model's terms forbid the wished license, or none is wished and the base models' licenses
            are unknown or differ.
    """
    gemma = [base.name for base in bases if base.license == "gemma"]
    if gemma:
        if wished not in (None, "gemma"):
            raise ValueError(
                "`license` must be 'gemma', since the Gemma terms extend to a fuser trained on the states of "
                f"{gemma[0]}, but got {wished!r}."
            )
        return "gemma"
    if wished is not None:
        return wished
    if unknown := [base.name for base in bases if base.license is None]:
        raise ValueError(
            f"`license` must be given, since the card of {', '.join(unknown)} names none or cannot be read; pass the "
            "Hub's name of a license that the base models' terms allow, such as 'apache-2.0'."
        )
    binding = sorted({str(base.license) for base in bases} - {*_PERMISSIVE})
    if len(binding) > 1:
        raise ValueError(f"`license` must be given, since those of the base models differ: {', '.join(binding)}.")
    return binding[0] if binding else "apache-2.0"


def license_text(license: str, bases: Sequence[BaseLicense]) -> str:
    """Return the card's section about the license."""
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
