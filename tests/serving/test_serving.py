"""The server, as the `openai` client, httpx and curl see it: answers, contexts, limits, errors, load."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tiny_model
from evaluation_for_tests import save_fuser
from packaging.version import parse
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor

NEEDS = "the server's tests need the extras `[serve]` and `[test]`"
httpx = pytest.importorskip("httpx", reason=NEEDS)
openai = pytest.importorskip("openai", reason=NEEDS)
psutil = pytest.importorskip("psutil", reason=NEEDS)
pytest.importorskip("fastapi", reason=NEEDS)

from serving_for_tests import NAME, running, tiny_pair  # noqa: E402

from c2c_hf.cli.main import main  # noqa: E402
from c2c_hf.serving.contexts import ContextStore, SharerContext  # noqa: E402
from c2c_hf.serving.engine import AnswerRequest, Engine, GeneratedAnswer, GenerationOptions, Prompt  # noqa: E402

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CONTEXT = "The keeper counted forty-seven ships."


class Served:
    """A running server, its model and an `openai` client."""

    def __init__(self, url: str, model: C2CForCausalLM, processor: C2CProcessor) -> None:
        self.url, self.model, self.processor = url, model, processor
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(self, content: str | None = None, **fields: Any) -> Any:
        messages = QUESTION if content is None else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(**{"model": NAME, "messages": messages, "max_tokens": 12, **fields})

    def text(self, content: str | None = None, **extra: Any) -> str:
        return self.ask(content, extra_body=extra).choices[0].message.content

    def post(self, path: str, body: Any) -> Any:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def metric(self, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)[1])

    def expected(self, inputs: Any, **kwargs: Any) -> str:
        out = self.model.generate(**inputs, max_new_tokens=12, do_sample=False, **kwargs)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module", params=["fusion", "memory"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    model, processor = tiny_pair(request.param)
    with running(model, processor, max_body_bytes=100_000) as url:
        yield Served(url, model, processor)


def test_answers_are_those_of_the_library(served: Served) -> None:
    for context in (None, CONTEXT):
        inputs = served.processor.apply_chat_template(QUESTION, sharer_context=context)
        response = served.ask(extra_body={} if context is None else {"sharer_context": context})
        assert response.choices[0].message.content == served.expected(inputs)
        assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]
        assert (response.choices[0].finish_reason, response.usage.completion_tokens) == ("length", 12)
    with served.model.disable_fusion():
        unfused = served.expected(inputs)
    assert served.text(sharer_context=CONTEXT, fusion=False) == unfused
    assert unfused != response.choices[0].message.content, "the context changes nothing, so nothing was compared"


def test_streams_join_to_the_answer(served: Served) -> None:
    extra = {"sharer_context": CONTEXT}
    chunks = list(served.ask(stream=True, stream_options={"include_usage": True}, extra_body=extra))
    *pieces, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == served.text(**extra)
    assert pieces[0].choices[0].delta.role == "assistant" and len(pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in pieces[-2:]] == [None, "length"]
    assert usage.choices == [] and usage.usage.completion_tokens == 12


def test_completions(served: Served) -> None:
    prompts = ["Rivers end in", "The capital of France is"]
    expected = [served.expected(served.processor(prompt, sharer_context=CONTEXT)) for prompt in prompts]
    fields = {"model": NAME, "prompt": prompts, "max_tokens": 12, "extra_body": {"sharer_context": CONTEXT}}
    response = served.client.completions.create(**fields)
    assert [choice.text for choice in response.choices] == expected
    texts = ["", ""]
    for chunk in served.client.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_contexts_are_prefilled_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"title": "Ships", "text": CONTEXT}, "Paris."]
    response = served.post("/v1/contexts", {"documents": documents})
    context = response.json()
    assert response.status_code == 200 and context["object"] == "context" and context["bytes"] > 0
    assert httpx.get(f"{served.url}/v1/contexts/{context['id']}").json() == context
    lengths: list[int] = []
    forward = served.model.sharers[0].base_model.forward

    def counting_forward(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    expected = [served.text(content, documents=documents) for content in ("Who?", "How many ships?")]
    monkeypatch.setattr(served.model.sharers[0].base_model, "forward", counting_forward)
    for _ in range(2):
        assert [served.text(content, context_id=context["id"]) for content in ("Who?", "How many ships?")] == expected
    if served.model.config.mode == "memory":
        assert lengths == []
    else:
        # Only what follows the context.
        assert max(lengths) < context["sharer_tokens"][0]
    assert served.client.delete(f"/contexts/{context['id']}", cast_to=httpx.Response).json()["deleted"]
    with pytest.raises(openai.NotFoundError, match="make it anew"):
        served.text(context_id=context["id"])


def test_sampling_is_the_seeds(served: Served) -> None:
    """Whatever other threads draw."""

    def draw(seed: int | None) -> str:
        return served.ask(temperature=1.0, seed=seed).choices[0].message.content

    seeds = [0, 1, 2, 3] * 3
    alone = {seed: draw(seed) for seed in range(4)}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, seeds)) == [alone[seed] for seed in seeds]
    assert len(set(alone.values())) == 4 and draw(None) != draw(None)
    assert served.ask(temperature=0).choices[0].message.content == served.text()
    assert served.ask(temperature=1.0, top_p=1e-9).choices[0].message.content == served.text()


def test_gumbel_noise_draws_from_the_distribution() -> None:
    from c2c_hf.serving.engine import GumbelNoise

    noise, scores = GumbelNoise(0), torch.tensor([[0.1, 0.2, 0.7, 0.0]]).log()
    draws = torch.cat([noise(torch.zeros(1, 1), scores).argmax(-1) for _ in range(4000)])
    frequencies = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.2, 0.7, 0.0]), atol=0.03, rtol=0)


def test_stop_strings_are_cut_off(served: Served) -> None:
    whole = served.text()
    stop = whole[len(whole) // 2 :][:2]
    response = served.ask(stop=[stop, "never"])
    assert response.choices[0].message.content == whole[: whole.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in served.ask(stop=stop, stream=True))
    assert streamed == whole[: whole.index(stop)]


#: Fields of a request, and what the error says about them.
REFUSED: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "tools": ({"tools": [{"type": "function"}]}, 400, "`tools` is not supported", "tools"),
    "n": ({"n": 2}, 400, "`n` is not supported", "n"),
    "typo": ({"sharer_contexts": "x"}, 400, "`sharer_contexts` is not supported", "sharer_contexts"),
    "temperature": ({"temperature": 3}, 400, "less than or equal to 2", "temperature"),
    "no tokens": ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    "no messages": ({"messages": []}, 400, "at least 1 item", "messages"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type 'text'", None),
    "no role": ({"messages": [{"content": "Hi"}]}, 400, "Field required", "messages"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "no unicode", None),
    "generation config": (
        {"generation_config": '{"top_k": 3}'},
        400,
        "`generation_config.top_k` is not supported",
        "generation_config",
    ),
    "no JSON": ({"generation_config": "{"}, 400, "Expecting property name", "generation_config"),
    "two contexts": ({"sharer_context": "x", "documents": ["y"]}, 400, "at most one of", None),
    "no such context": ({"context_id": "x"}, 404, "There is no context 'x'", "context_id"),
    "other model": ({"model": "gpt-4"}, 404, "The model 'gpt-4' does not exist", "model"),
    "template": ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "'chat_template'", "chat_template_kwargs"),
    "forged turns": (
        {"chat_template_kwargs": {"split_special_tokens": False}},
        400,
        "'split_special_tokens'",
        "chat_template_kwargs",
    ),
    "long": ({"messages": [{"role": "user", "content": "ship " * 300}]}, 400, "the receiver's context is 256", None),
    "long context": ({"sharer_context": "ship " * 300}, 400, "256", None),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals_have_openais_form(served: Served, name: str, stream: bool) -> None:
    fields, status, message, param = REFUSED[name]
    content = json.dumps({"model": NAME, "messages": QUESTION, "stream": stream, **fields})
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"] and error["message"].endswith((".", "!"))
    assert error["type"] == "invalid_request_error" and error["param"] == param and "code" in error


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("GET", "/v1/models/other", {}, 404),
        ("DELETE", "/v1/contexts/x", {}, 404),
        ("POST", "/v1/chat/completions", {"content": "{", "headers": {"content-type": "application/json"}}, 400),
        # A web page may send this without asking, but no JSON.
        ("POST", "/v1/chat/completions", {"content": "{}", "headers": {"content-type": "text/plain"}}, 400),
        ("POST", "/v1/contexts", {"json": {}}, 400),
        ("POST", "/v1/contexts", {"json": {"sharer_context": " "}}, 400),
        ("POST", "/v1/contexts", {"json": {"sharer_context": "ship " * 300}}, 400),
        ("GET", "/health", {"headers": {"host": "rebound.example"}}, 400),
    ],
)
def test_other_errors(served: Served, method: str, path: str, options: dict[str, Any], status: int) -> None:
    response = httpx.request(method, f"{served.url}{path}", **options)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_fields_without_effect_are_taken(served: Served) -> None:
    fields = {"user": "me", "n": 1, "presence_penalty": 0.0, "logprobs": False, "response_format": {"type": "text"}}
    assert served.ask(**fields).choices[0].message.content == served.text()
    # `None` is what OpenAI's client sends for nothing.
    assert served.text(stop=None, tools=None, max_completion_tokens=12) == served.text()


def test_models_and_health(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "model": NAME, "running": 0, "waiting": 0}
    before = served.metric("c2c_generated_tokens_total")
    served.ask()
    assert served.metric("c2c_generated_tokens_total") == before + 12
    assert served.metric("c2c_first_token_seconds_count") > 0


def test_large_bodies_are_refused(served: Served) -> None:
    """100 MB, of declared and of unknown length; the memory does not grow by it."""
    process = psutil.Process()
    url, headers = f"{served.url}/v1/chat/completions", {"content-type": "application/json"}
    largest = [process.memory_info().rss] * 2

    def pieces() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 100_000
            largest[1] = max(largest[1], process.memory_info().rss)

    for extra in ({}, {"content-length": str(10**8)}):
        response = httpx.post(url, content=pieces(), headers={**headers, **extra}, timeout=60)
        assert response.status_code == 413
        assert "The body is larger than 100000 bytes." == response.json()["error"]["message"]
    assert largest[1] - largest[0] < 30e6
    with pytest.raises(openai.APIStatusError, match="larger than") as caught:
        served.ask("ship " * 100_000)
    assert caught.value.status_code == 413


def test_curl(served: Served) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": NAME, "messages": QUESTION, "max_tokens": 12, "stream": True})
    command = [curl, "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    *events, done = [line.removeprefix("data: ") for line in printed.splitlines() if line]
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == served.text()


@pytest.mark.skipif(
    parse(transformers.__version__) < parse("5.24"), reason="earlier `transformers chat` asks otherwise"
)
def test_transformers_chat() -> None:
    """The command of transformers, as it is used without a terminal."""
    model, processor = tiny_pair()
    with running(model, processor) as url:
        command = [sys.executable, "-m", "transformers.cli.transformers", "chat", NAME, f"{url}/v1"]
        command += ["max_new_tokens=12", "do_sample=False"]
        text = f"{QUESTION[0]['content']}\nn\n!exit\n"
        # Its client of the server is the Hub's, which asks nobody in offline mode.
        environment = {**os.environ, "COLUMNS": "500", "HF_HUB_OFFLINE": "0"}
        process = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, env=environment)
        assert process.returncode == 0, process.stderr
        assert "was already loaded" in process.stdout and "reaching the token limit" in process.stdout
        words = re.findall(r"\w+", Served(url, model, processor).text())
        assert words and re.search(r"\W+".join(words), process.stdout), process.stdout


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "this never came about"
        time.sleep(0.02)


class Gate:
    """Holds every answer at its first token until it is opened."""

    def __init__(self, model: C2CForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.num_tokens = threading.Event(), 0
        forward = model.receiver.forward

        def held_forward(*args: Any, **kwargs: Any) -> Any:
            assert self.opened.wait(30)
            self.num_tokens += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.receiver, "forward", held_forward)


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_pair()
    gate = Gate(model, monkeypatch)
    with running(model, processor, max_running=1, max_waiting=2, max_batch=1) as url, ThreadPoolExecutor(3) as pool:
        served = Served(url, model, processor)
        answers = [pool.submit(served.text) for _ in range(3)]
        health = httpx.get(f"{url}/health").json
        wait_until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 2)
        with pytest.raises(openai.RateLimitError, match="As many requests wait as may") as caught:
            served.ask()
        assert caught.value.response.headers["retry-after"] == "1" and health()["status"] == "ok"
        assert served.post("/v1/contexts", {"sharer_context": "x"}).status_code == 429
        gate.opened.set()
        assert len({answer.result() for answer in answers}) == 1
        assert served.text() == answers[0].result()


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_disconnects_frees_its_place(
    monkeypatch: pytest.MonkeyPatch, stream: bool, max_batch: int
) -> None:
    model, processor = tiny_pair()
    gate = Gate(model, monkeypatch)
    body = {"model": NAME, "messages": QUESTION, "stream": stream, "max_tokens": 200}
    with running(model, processor, max_running=1, max_waiting=2, max_batch=max_batch) as url:

        def leave_early() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.3))

        served = Served(url, model, processor)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: leave_early(), range(2)))
        # The waiting one has left at once, the running one leaves at its first token.
        wait_until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 0)
        gate.opened.set()
        wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 0)
        assert gate.num_tokens < 5
        assert len(served.text()) > 0
        if stream:
            # In the middle of an answer.
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as response:
                next(response.iter_lines())
            wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 0)
            assert gate.num_tokens < 150


def test_rows_of_a_batch_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that wait share a batch; a short answer is not held up by a long one."""
    model, processor = tiny_pair()
    gate = Gate(model, monkeypatch)
    with running(model, processor, max_running=1) as url, ThreadPoolExecutor(3) as pool:
        served = Served(url, model, processor)

        def wait_for(**health: int) -> None:
            wait_until(lambda: health.items() <= httpx.get(f"{url}/health").json().items())

        first = pool.submit(served.ask, max_tokens=1)
        wait_for(running=1, waiting=0)
        short, long = (pool.submit(served.ask, max_tokens=number) for number in (4, 150))
        wait_for(running=1, waiting=2)
        gate.opened.set()
        assert first.result().usage.completion_tokens == 1
        assert short.result().usage.completion_tokens == 4 and not long.done()
        assert long.result().usage.completion_tokens == 150
        short, long = (answer.result().choices[0].message.content for answer in (short, long))
        assert long.startswith(short)
        assert gate.num_tokens < 160, "they were not one batch"


def test_a_fault_is_no_clients_business(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_pair()
    with running(model, processor) as url:
        served = Served(url, model, processor)
        forward, num_calls = model.receiver.forward, 0

        def failing_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 6:
                raise RuntimeError("secret")
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.receiver, "forward", failing_forward)
        with pytest.raises(openai.InternalServerError, match=r"The server failed \(RuntimeError\)") as caught:
            served.ask()
        assert "secret" not in str(caught.value)
        num_calls = 0
        with pytest.raises(openai.APIError, match=r"The server failed \(RuntimeError\)"):
            list(served.ask(stream=True))
        assert len(served.text()) > 0


def test_a_receiver_without_chat_template() -> None:
    model, processor = tiny_pair("memory", chat=False)
    with running(model, processor) as url:
        served = Served(url, model, processor)
        with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
            served.ask()
        context = served.post("/v1/contexts", {"sharer_context": CONTEXT}).json()
        answers = [
            served.client.completions.create(model=NAME, prompt="The keeper", max_tokens=8, extra_body=extra)
            for extra in ({"sharer_context": CONTEXT}, {"context_id": context["id"]})
        ]
        assert answers[0].choices[0].text == answers[1].choices[0].text


def test_contexts_used_longest_ago_go_first() -> None:
    engine = Engine(*tiny_pair("memory"), max_new_tokens=8)
    contexts = [engine.prefill(text) for text in ("The ships.", "The café.", "The sky.")]
    store = ContextStore(max_bytes=contexts[0].num_bytes + contexts[2].num_bytes)
    for context in contexts[:2]:
        store.add(context)
    assert store.get(contexts[0].id) is contexts[0]
    store.add(contexts[2])
    assert [store.get(context.id) for context in contexts] == [contexts[0], None, contexts[2]]
    assert len(store) == 2 and store.num_bytes <= store.max_bytes
    large = SharerContext("large", "", [cache for context in contexts for cache in context.caches])
    with pytest.raises(ValueError, match="may be kept; shorten it"):
        store.add(large)
    assert len(store) == 2


def answers(
    engine: Engine, *prompts: Prompt, options: Sequence[GenerationOptions] = ()
) -> list[GeneratedAnswer | Exception]:
    found: dict[int, GeneratedAnswer | Exception] = {}
    requests = zip(prompts, options or [GenerationOptions()] * len(prompts), strict=True)
    engine.generate([AnswerRequest(*request, partial(found.setdefault, i)) for i, request in enumerate(requests)])
    return [found[index] for index in range(len(prompts))]


@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_answers_of_a_batch_are_those_of_single_requests(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unequal length and with every kind of option; a fault is that of its own request."""
    engine = Engine(*tiny_pair(mode), max_new_tokens=24)
    contexts = [None, CONTEXT, f"{CONTEXT} The sky is blue."]
    prompts = [Prompt("Who counted the ships? " * (index + 1), contexts[index % 3]) for index in range(6)]
    options = [GenerationOptions(length, seed=3, temperature=index % 2) for index, length in enumerate((24, 3, 9) * 2)]
    options[4] = GenerationOptions(stop=["e"])
    faulty = [Prompt(""), Prompt("Who?", "ship " * 300), Prompt("ship " * 300)]
    batches: list[int] = []
    forward = engine.model.receiver.forward

    def recording_forward(*args: Any, **kwargs: Any) -> Any:
        batches.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model.receiver, "forward", recording_forward)
    alone = [answers(engine, prompt, options=[option])[0] for prompt, option in zip(prompts, options, strict=True)]
    assert len({answer.text for answer in alone}) == 6 and set(batches) == {1}
    del batches[:]
    assert answers(engine, *prompts, options=options) == alone
    assert set(batches) == {6} and len(batches) < 30, "one batch, until the last row has ended"
    found = answers(engine, *prompts, *faulty, options=[*options, *[GenerationOptions()] * 3])
    assert found[:6] == alone
    assert all(isinstance(error, ValueError) for error in found[6:]), found[6:]


def test_answers_end_with_the_receivers_context() -> None:
    engine = Engine(*tiny_pair(), max_new_tokens=10_000)
    prompt = Prompt("ship " * 110)
    (answer,) = answers(engine, prompt)
    assert answer.num_prompt_tokens > 200
    assert answer.num_prompt_tokens + answer.num_tokens == 256 and answer.finish_reason == "length"
    own = answer.text
    engine.model.generation_config.eos_token_id = engine.processor.tokenizer(own)["input_ids"][3:9]
    (answer,) = answers(engine, prompt)
    assert answer.finish_reason == "stop" and answer.num_tokens < 15


@pytest.mark.parametrize("mode", ["fusion", pytest.param("memory", marks=pytest.mark.slow)])
def test_load(mode: str) -> None:
    """200 requests by 8 clients: no error, no leak, and every answer that of the same request alone."""
    model, processor = tiny_pair(mode)
    questions = ["Where are the ships?", "What is the capital of France?", "Who counted?", "Is the sky blue?"]
    with running(model, processor) as url:
        served = Served(url, model, processor)
        context_id = served.post("/v1/contexts", {"sharer_context": CONTEXT}).json()["id"]
        extras = [{}, {"sharer_context": CONTEXT}, {"context_id": context_id}, {"fusion": False}]

        def request(index: int) -> str:
            content, extra = questions[index % 4], extras[index // 4 % 4]
            if index % 3:
                return served.ask(content, max_tokens=4, extra_body=extra).choices[0].message.content
            chunks = served.ask(content, max_tokens=4, stream=True, extra_body=extra)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        alone = [request(index) for index in range(48)]
        assert len(set(alone)) >= 8, "neither question nor context change the answer"
        with ThreadPoolExecutor(8) as pool:
            # Threads and connections take memory once.
            list(pool.map(request, range(24)))
            gc.collect()
            before = psutil.Process().memory_info().rss
            found = list(pool.map(request, range(200)))
        gc.collect()
        after = psutil.Process().memory_info().rss
        assert found == [alone[index % 48] for index in range(200)]
        assert abs(after - before) < 0.05 * before
        # A job leaves the queue just after its response.
        wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 0)


def test_the_command(tmp_path: Any) -> None:
    """As a user starts it: one line on standard output, nothing else; Ctrl+C ends it."""
    receiver = save_tiny_model(tmp_path / "receiver", "llama", byte_level_tokenizer())
    sharer = save_tiny_model(tmp_path / "sharer", "qwen3", metaspace_tokenizer(), seed=1)
    fuser = tmp_path / "my-fuser"
    C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, fuser_hidden_size=8).save_pretrained(fuser)
    C2CProcessor.from_receiver_and_sharers(receiver, sharer).save_pretrained(fuser)
    command = [sys.executable, "-m", "c2c_hf", "serve", str(fuser), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.fullmatch(r"Serving 'my-fuser' at (http://127\.0\.0\.1:\d+)/v1; Ctrl\+C ends it\.\n", line)[1]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            answer = client.chat.completions.create(model="my-fuser", messages=QUESTION, max_tokens=2)
            assert answer.usage.completion_tokens == 2
        finally:
            process.send_signal(2)
        out, err = process.communicate(timeout=30)
    assert not out and not err


def test_the_command_opens_nothing_by_accident(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "general", "--host", "0.0.0.0"]) == 1
    assert "opens the server to other machines: name with `--allowed-host`" in capsys.readouterr().err


def test_transformers_serve_looks_up_its_own_classes(tmp_path: Path) -> None:
    """The reason that the guide on clients gives for `c2c serve`; once this fails, transformers can serve a fuser."""
    model_manager = pytest.importorskip("transformers.cli.serving.model_manager", reason=NEEDS)
    folder = save_fuser(tmp_path, "fuser")
    manager = model_manager.ModelManager(device="cpu")
    with pytest.raises(AttributeError, match="transformers has no attribute C2CForCausalLM"):
        manager.load_model_and_processor(str(folder))
    with pytest.raises(ValueError, match="Unknown modality for: C2CForCausalLM"):
        manager.get_model_modality(C2CForCausalLM.from_pretrained(folder), C2CProcessor.from_pretrained(folder))
