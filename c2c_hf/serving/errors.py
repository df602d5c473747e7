"""Errors in OpenAI's form, and the middleware that gives this form to all of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .jobs import QueueFullError

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An error in OpenAI's form.

    Args:
        status: HTTP status.
        message: One sentence.
        code: Short name, or `None`.
        param: Field of the request, or `None`.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body, self.status, {"retry-after": "1"} if self.status == 429 else None)


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Turn what the engine raises into [`ApiError`]s; a fault of the server is logged, and its message stays there."""
    try:
        yield
    except (ApiError, ClientDisconnect):
        raise
    except QueueFullError as error:
        raise ApiError(429, "As many requests wait as may; try again later.", "queue_full") from error
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_value") from error
    except torch.OutOfMemoryError as error:
        raise ApiError(503, "There is not enough memory for this request.", "out_of_memory") from error
    except Exception as error:
        logger.exception("A request failed.")
        raise ApiError(500, f"The server failed ({type(error).__name__}); its log says more.", "failed") from error


class ErrorForm:
    """ASGI middleware: counts responses, and puts errors that other middleware sends as text into OpenAI's form.

    Args:
        app: The application.
        counter: Of responses, by path and status.
        texts: Messages by status, in place of those texts.
    """

    def __init__(self, app: ASGIApp, counter: Counter, texts: dict[int, str]) -> None:
        self.app, self.counter, self.texts = app, counter, texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        replaced = False

        async def own_send(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                # The route's own path: those of requests could be any number.
                path = getattr(scope.get("route"), "path", "other")
                self.counter.labels(path, message["status"]).inc()
                is_text = Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")
                replaced = message["status"] >= 400 and is_text
                if replaced:
                    text = self.texts.get(message["status"], "The request was refused.")
                    await ApiError(message["status"], text).response()(scope, receive, send)
            if not replaced:
                await send(message)

        await self.app(scope, receive, own_send)
