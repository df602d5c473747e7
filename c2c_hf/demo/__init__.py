"""The real pair that installs from PyPI, and the trained fusers that come with the package."""

from .pypi_pair import local_pair
from .shipped_fusers import from_pretrained, questions, shipped_fuser

__all__ = ["from_pretrained", "local_pair", "questions", "shipped_fuser"]
