"""An OpenAI-compatible server for one model, of the extra `[serve]`."""

from .app import create_app

__all__ = ["create_app"]
