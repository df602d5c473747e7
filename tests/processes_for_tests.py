"""Several processes of one run on this machine, forked, as `accelerate launch` would start them."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import c2c_hf

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available(),
    reason="processes are forked, which this system, or CUDA, does not allow",
)


def run_fresh(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in a process that has not imported the package, with a folder as `sys.argv[1]`."""
    search_path = os.pathsep.join([str(Path(c2c_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "PYTHONPATH": search_path}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def run_processes(count: int, function: Callable[..., None], *args: Any) -> list[int]:
    """Run `function(*args)` in several processes with gloo between them.

    Returns:
        Their exit codes; when one fails, the others are killed, as the launchers do.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(index, count, port, function, args)) for index in range(count)]
    for worker in workers:
        worker.start()
    running = set(workers)
    while running:
        ready = multiprocessing.connection.wait([worker.sentinel for worker in running], timeout=120)
        if not ready or any(worker.exitcode for worker in running if worker.sentinel in ready):
            for worker in running:
                worker.kill()
        running = {worker for worker in running if worker.sentinel not in ready} if ready else set()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _work(index: int, count: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    # Threads of the parent are not here; a pool that waits for them would wait for ever.
    torch.set_num_threads(1)
    ranks = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    function(*args)
    torch.distributed.destroy_process_group()


def die() -> None:
    """End this process as the system's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(seconds: float) -> None:
    """Kill this process in `seconds`, whatever it does then."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()
