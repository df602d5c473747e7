"""A tiny pair behind the server, on loopback."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from conftest import randomize_fuser, tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.serving.app import create_app

NAME = "tiny"


def tiny_pair(mode: str = "fusion", chat: bool = True) -> tuple[C2CForCausalLM, C2CProcessor]:
    """A receiver and a sharer of other tokenizers, with a fuser that changes answers."""
    receiver = byte_level_tokenizer() if chat else byte_level_tokenizer(chat_template=None)
    sharer = metaspace_tokenizer()
    model = C2CForCausalLM.from_receiver_and_sharers(
        tiny_model("llama", 0, len(receiver)),
        tiny_model("qwen3", 1, len(sharer)),
        mode=mode,
        token_alignment="span",
        fuser_hidden_size=8,
        fuser_intermediate_size=8,
    )
    return randomize_fuser(model, seed=3), C2CProcessor(receiver, sharer, mode=mode)


@contextmanager
def running(model: C2CForCausalLM, processor: C2CProcessor, **limits: object) -> Iterator[str]:
    """Serve a model in a thread; yields the server's address."""
    app = create_app(model, processor, NAME, **limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
