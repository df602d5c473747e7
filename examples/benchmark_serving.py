"""Load on `c2c serve`: many clients at once, with and without batches, against single requests.

    python examples/benchmark_serving.py general --clients 8 --requests 64

prints for each size of batch the generated tokens a second, how long a request took, how many answers are those of the
same request alone, and the memory of the process before and after.
"""

import argparse
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import psutil
import torch
import uvicorn

from c2c_hf.demo import from_pretrained
from c2c_hf.serving.app import create_app

QUESTIONS = (
    "Where do rivers end?",
    "What is the capital of France, and on which river does it lie?",
    "Name a metal.",
    "Why is the sky blue on a clear day, and red in the evening?",
)


@contextmanager
def running(max_batch: int, arguments: argparse.Namespace) -> Iterator[str]:
    """Serve the model in a thread; yields the address of the endpoint."""
    limits = {"max_running": arguments.max_running, "max_waiting": arguments.clients, "max_batch": max_batch}
    app = create_app(*arguments.model, name="c2c", **limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
        server.should_exit = True
        thread.join()


def main() -> None:
    """Ask every question alone, then by all clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=from_pretrained, help="general, memory, a folder or a Hub id")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-running", type=int, default=1, help="batches at once")
    parser.add_argument("--max-batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    print(f"{arguments.requests} requests, {arguments.clients} clients, {torch.get_num_threads()} threads")
    print("| batch | tokens/s | median, s | 95 %, s | equal | memory before, MB | after |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for max_batch in arguments.max_batch:
        with running(max_batch, arguments) as url, httpx.Client(timeout=None) as client:

            def ask(index: int) -> tuple[str, int, float]:
                message = {"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}
                body = {"model": "c2c", "messages": [message], "max_tokens": arguments.max_tokens, "temperature": 0}
                start = time.perf_counter()
                answer = client.post(url, json=body).raise_for_status().json()  # noqa: B023
                text, tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
                return text, tokens, time.perf_counter() - start

            alone = [ask(index)[0] for index in range(len(QUESTIONS))]
            with ThreadPoolExecutor(arguments.clients) as pool:
                list(pool.map(ask, range(arguments.clients)))
                before, start = psutil.Process().memory_info().rss, time.perf_counter()
                texts, tokens, seconds = zip(*pool.map(ask, range(arguments.requests)), strict=True)
                speed = sum(tokens) / (time.perf_counter() - start)
            after = psutil.Process().memory_info().rss
        equal = sum(text == alone[index % len(alone)] for index, text in enumerate(texts))
        figures = [f"{speed:.1f}", *(f"{value:.2f}" for value in np.quantile(seconds, (0.5, 0.95)))]
        memory = [f"{size / 2**20:.0f}" for size in (before, after)]
        print(f"| {max_batch} | {' | '.join([*figures, f'{equal} of {len(texts)}', *memory])} |", flush=True)


if __name__ == "__main__":
    main()
