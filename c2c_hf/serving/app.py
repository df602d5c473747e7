"""The HTTP application: OpenAI's endpoints, contexts, health and metrics."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .contexts import ContextStore, SharerContext
from .engine import AnswerRequest, Engine, GeneratedAnswer, GenerationOptions, Prompt
from .errors import ApiError, ErrorForm, as_api_errors
from .jobs import Job, JobQueue, QueueFullError
from .metrics import Metrics
from .requests import ChatRequest, CompletionRequest, ContextRequest, LoadRequest

#: Names by which this machine calls itself.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
#: What nginx answers a client that has gone; nobody sees it but the metrics.
_CLIENT_GONE = 499

Result = TypeVar("Result")


async def _unless_disconnected(request: Request, awaitable: Awaitable[Result]) -> Result:
    """Wait, but not longer than the client does.

    Raises:
        ClientDisconnect: It has gone; what was waited for is cancelled.
    """

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


class Generation:
    """The answers of one request, each a job of its own, in the format of one endpoint.

    Args:
        chat: Whether in that of chats.
        model_name: Of the response.
        jobs: One per prompt.
        metrics: Count the tokens.
    """

    def __init__(self, chat: bool, model_name: str, jobs: Sequence[Job[GeneratedAnswer]], metrics: Metrics) -> None:
        self._chat, self._jobs, self._metrics = chat, jobs, metrics
        self._start = time.perf_counter()
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    async def response(self) -> dict[str, Any]:
        """Return the whole response."""
        answers, choices = [], []
        async for index, piece in self._events():
            if isinstance(piece, GeneratedAnswer):
                answers.append(piece)
                content: dict[str, Any] = {"text": piece.text}
                if self._chat:
                    content = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
                choices.append(self._choice(index, content, piece.finish_reason))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": _usage(answers)}

    async def chunks(self, with_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events.

        Args:
            with_usage: End with one that has the numbers of tokens.

        Raises:
            Exception: What the work raised before the first piece of text. Later it is an event.
        """
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        answers, is_first = [], True

        def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
            chunk = {**self._common, "object": kind, "choices": choices}
            return _event({**chunk, "usage": usage} if with_usage else chunk)

        try:
            async for index, piece in self._events():
                if is_first and self._chat:
                    yield event([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])
                is_first = False
                if isinstance(piece, str):
                    content: dict[str, Any] = {"delta": {"content": piece}} if self._chat else {"text": piece}
                    yield event([self._choice(index, content, None)])
                else:
                    answers.append(piece)
                    content = {"delta": {}} if self._chat else {"text": ""}
                    yield event([self._choice(index, content, piece.finish_reason)])
        except ApiError as error:
            if is_first:
                raise
            yield _event(error.body)
            return
        if with_usage:
            yield event([], _usage(answers))
        yield "data: [DONE]\n\n"

    async def _events(self) -> AsyncIterator[tuple[int, str | GeneratedAnswer]]:
        """Yield the pieces of every answer and the answer, with its index; whoever leaves early cancels all."""
        is_first = True
        try:
            with as_api_errors():
                for index, job in enumerate(self._jobs):
                    async for event in job.events():
                        if is_first:
                            self._metrics.first_token_seconds.observe(time.perf_counter() - self._start)
                        is_first = False
                        if isinstance(event, GeneratedAnswer):
                            self._metrics.prompt_tokens.inc(event.num_prompt_tokens)
                            self._metrics.generated_tokens.inc(event.num_tokens)
                        yield index, event
        finally:
            for job in self._jobs:
                job.cancel()

    @staticmethod
    def _choice(index: int, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(answers: Sequence[GeneratedAnswer]) -> dict[str, int]:
    prompt, completion = (
        sum(answer.num_prompt_tokens for answer in answers),
        sum(answer.num_tokens for answer in answers),
    )
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def create_app(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    name: str = "c2c",
    max_running: int = 2,
    max_waiting: int = 32,
    max_batch: int = 8,
    max_new_tokens: int = 512,
    max_body_bytes: int = 4 * 2**20,
    max_context_bytes: int = 2**30,
    allowed_hosts: Sequence[str] = LOOPBACK_HOSTS,
) -> FastAPI:
    """Build an ASGI application that serves a model as OpenAI's API does.

    Args:
        model: The model.
        processor: Its processor.
        name: What clients call the model.
        max_running: Number of batches that are generated at once.
        max_waiting: Number of requests that wait for these; further ones get status 429.
        max_batch: Number of answers in a batch.
        max_new_tokens: Maximum length of an answer, and its length where a request names none.
        max_body_bytes: Largest body of a request; a larger one gets status 413 and is not kept.
        max_context_bytes: Size of the key/value states of all prefilled contexts; those used longest ago go first.
        allowed_hosts: Names in the `Host` header that are answered, so that no web page reaches the server by a name
            of its own; `"*"` for any.

    Raises:
        ValueError: The processor is not the model's.

    Example:
        ```python
        app = create_app(model, processor, name="my-fuser")
        uvicorn.run(app, port=8000)
        ```
    """
    engine = Engine(model, processor, max_new_tokens)
    queue, contexts = JobQueue(max_running, max_waiting, max_batch), ContextStore(max_context_bytes)
    metrics = Metrics(queue, contexts)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    # The pages of FastAPI's documentation load scripts from elsewhere.
    app = FastAPI(title="c2c_hf", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=max_body_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    too_large = f"The body is larger than {max_body_bytes} bytes."
    texts = {400: "The name in the `Host` header is not one of this server's.", 413: too_large}
    app.add_middleware(ErrorForm, counter=metrics.responses, texts=texts)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = too_large if error.status_code == 413 else f"{error.detail}: {request.method} {request.url.path}."
        return ApiError(error.status_code, message).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # "body", the field, and for lists and unions further names.
        param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
        if first["type"] == "extra_forbidden":
            message, code = f"`{'.'.join(map(str, first['loc'][1:]))}` is not supported.", "unsupported_parameter"
        else:
            message, code = str(first["msg"]).removeprefix("Value error, "), "invalid_value"
            message = f"`{param}`: {message}." if param is not None else f"{message}."
        return ApiError(400, message, code, param).response()

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)

    def find_context(context_id: str) -> SharerContext:
        context = contexts.get(context_id)
        if context is None:
            message = f"There is no context {context_id!r} (any more); make it anew by POST /v1/contexts."
            raise ApiError(404, message, "context_not_found", "context_id")
        return context

    def check_name(asked: str) -> None:
        if asked != name:
            raise ApiError(404, f"The model {asked!r} does not exist; this is {name!r}.", "model_not_found", "model")

    def model_card() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "c2c_hf", "mode": model.config.mode}

    def generate(jobs: Sequence[Job[GeneratedAnswer]]) -> None:
        requests = []
        for job in jobs:
            prompt, options = job.task
            requests.append(AnswerRequest(prompt, options, job.finish, job.emit, job.is_cancelled))
        engine.generate(requests)

    def start(prompts: Sequence[Prompt], options: GenerationOptions) -> list[Job[GeneratedAnswer]]:
        jobs: list[Job[GeneratedAnswer]] = []
        try:
            for prompt in prompts:
                jobs.append(Job(queue, generate, (prompt, options), engine.batch_key(prompt, options)))
        except QueueFullError:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    async def answer(request: Request, body: ChatRequest | CompletionRequest) -> Response:
        check_name(body.model)
        prefilled = None if body.context_id is None else find_context(body.context_id)
        prompts, is_chat = body.prompts(prefilled), isinstance(body, ChatRequest)
        with as_api_errors():
            generation = Generation(is_chat, name, start(prompts, body.options()), metrics)
            if not body.stream:
                return JSONResponse(await _unless_disconnected(request, generation.response()))
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = generation.chunks(with_usage)
            # What fails before the first piece of text still gets its own status.
            first = await _unless_disconnected(request, anext(chunks))

        async def events() -> AsyncIterator[str]:
            yield first
            async for chunk in chunks:
                yield chunk

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body)

    def describe(context: SharerContext) -> dict[str, Any]:
        return {
            "id": context.id,
            "object": "context",
            "sharer_tokens": context.num_tokens,
            "bytes": context.num_bytes,
        }

    @app.post("/v1/contexts")
    async def make_context(request: Request, body: ContextRequest) -> dict[str, Any]:
        def prefill(jobs: Sequence[Job[SharerContext]]) -> None:
            context = engine.prefill(body.text())
            contexts.add(context)
            jobs[0].finish(context)

        with as_api_errors():
            return describe(await _unless_disconnected(request, Job[SharerContext](queue, prefill).result()))

    @app.get("/v1/contexts/{context_id}")
    async def show_context(context_id: str) -> dict[str, Any]:
        return describe(find_context(context_id))

    @app.delete("/v1/contexts/{context_id}")
    async def drop_context(context_id: str) -> dict[str, Any]:
        find_context(context_id)
        return {"id": context_id, "object": "context.deleted", "deleted": contexts.remove(context_id)}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model_name:path}")
    async def show_model(model_name: str) -> dict[str, Any]:
        check_name(model_name)
        return model_card()

    @app.post("/load_model")
    async def load_model(body: LoadRequest) -> Response:
        # `transformers chat` asks for this first, and waits for the event that says so.
        check_name(body.model)
        return Response(_event({"status": "ready", "cached": True}), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "running": queue.num_running, "waiting": queue.num_waiting}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=Metrics.media_type)

    return app
