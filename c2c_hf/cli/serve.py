"""The command `c2c serve`."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from .options import FUSER_HELP, Alignment, Device, Precision, Receiver, Sharers, load_model

#: Addresses at which only programs of this machine reach the server.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def serve(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=FUSER_HELP)] = None,
    receiver: Receiver = None,
    sharers: Sharers = None,
    token_alignment: Alignment = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any free one.")] = 8000,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="Name or address by which clients may call the server, beside those of this machine; once per name, "
            "* for any.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call the model.", show_default="MODEL, without its folder"),
    ] = None,
    max_running: Annotated[int, typer.Option(metavar="N", min=1, help="Batches that are generated at once.")] = 2,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests that wait for these; further ones are refused.")
    ] = 32,
    max_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Answers in a batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer.")] = 512,
    max_body_mb: Annotated[
        float, typer.Option("--max-body-mb", metavar="MB", min=0.001, help="Largest body of a request.")
    ] = 4.0,
    max_context_mb: Annotated[
        float,
        typer.Option("--max-context-mb", metavar="MB", min=0.001, help="Size of all prefilled contexts together."),
    ] = 1024.0,
) -> None:
    """Serve a model to the clients of OpenAI's API."""
    if host not in _LOOPBACK and not allowed_hosts:
        raise ValueError(
            f"`--host {host}` opens the server to other machines: name with `--allowed-host` what they call this one "
            "(* for any name)."
        )
    try:
        import uvicorn

        from ..serving.app import LOOPBACK_HOSTS, create_app
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: run `pip install "c2c_hf[serve]"`.') from error

    # Before the model loads, so that a port that is taken is not found out a minute later.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        c2c, processor = load_model(model, receiver, sharers, token_alignment, dtype, device)
        name = name or ("c2c" if model is None else Path(model).name if Path(model).is_dir() else model)
        app = create_app(
            c2c,
            processor,
            name,
            max_running=max_running,
            max_waiting=max_waiting,
            max_batch=max_batch,
            max_new_tokens=max_new_tokens,
            max_body_bytes=int(max_body_mb * 2**20),
            max_context_bytes=int(max_context_mb * 2**20),
            allowed_hosts=[*LOOPBACK_HOSTS, *(allowed_hosts or [])],
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"Serving {name!r} at http://{shown}:{listening.getsockname()[1]}/v1; Ctrl+C ends it.", flush=True)
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=512, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])
