"""The real pair that installs from PyPI, and the trained fusers that come with the package."""

from .local_pair import SHIPPED_FUSERS, from_pretrained, load_fuser, local_pair, questions, shipped_fuser

__all__ = ["SHIPPED_FUSERS", "load_fuser", "from_pretrained", "local_pair", "questions", "shipped_fuser"]
