"""Work of requests: worker threads behind a bounded queue, and their pieces in the event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Generic, TypeAlias, TypeVar

Result = TypeVar("Result")
#: Called with a function that takes pieces of text, and one that says whether to stop.
Work: TypeAlias = Callable[[Callable[[str], None], Callable[[], bool]], Result]


class QueueFullError(Exception):
    """As many jobs run and wait as may."""


class JobQueue:
    """Worker threads and the jobs that wait for one.

    Args:
        max_running: Number of threads.
        max_waiting: Largest number of waiting jobs.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="c2c-serve")
        self._lock = threading.Lock()
        self._num_jobs = 0

    @property
    def num_running(self) -> int:
        """Number of jobs that have a thread."""
        return min(self._num_jobs, self.max_running)

    @property
    def num_waiting(self) -> int:
        """Number of jobs that have none yet."""
        return self._num_jobs - self.num_running

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function in a thread, as soon as one is free.

        Raises:
            QueueFullError: The queue is full.
        """
        with self._lock:
            if self._num_jobs >= self.max_running + self.max_waiting:
                raise QueueFullError
            self._num_jobs += 1
        future = self._pool.submit(function)
        future.add_done_callback(self._leave)
        return future

    def close(self) -> None:
        """Drop waiting jobs and wait for the running ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _leave(self, future: "Future[Result]") -> None:
        with self._lock:
            self._num_jobs -= 1


class Job(Generic[Result]):
    """One piece of work, seen from the event loop in which it is made.

    Args:
        queue: Whose threads do it.
        work: The work.

    Raises:
        QueueFullError: The queue is full.
    """

    def __init__(self, queue: JobQueue, work: Work[Result]) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._future = queue.submit(partial(work, self._put, self._cancelled.is_set))
        self._future.add_done_callback(lambda future: self._put(None))

    async def events(self) -> AsyncIterator[str | Result]:
        """Yield the pieces of text, then the result.

        Raises:
            Exception: Whatever the work raised.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        yield self._future.result()

    async def result(self) -> Result:
        """Return the result of work without pieces; a caller that leaves early cancels the job.

        Raises:
            Exception: Whatever the work raised.
        """
        try:
            await self._pieces.get()
            return self._future.result()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Take the job out of the queue, or let it stop at the next token."""
        self._cancelled.set()
        self._future.cancel()

    def _put(self, piece: str | None) -> None:
        # The loop is closed where the server stopped before the thread did.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
