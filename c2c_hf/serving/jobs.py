"""Work of requests: worker threads behind a bounded queue, which take jobs of a kind as one batch."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeAlias, TypeVar

Result = TypeVar("Result")

#: How long a worker waits for further jobs that may join the first one.
_JOINING_SECONDS = 0.005


class QueueFullError(Exception):
    """As many jobs run and wait as may."""


class JobQueue:
    """Worker threads and the jobs that wait for one.

    Args:
        max_running: Number of threads, each with one batch.
        max_waiting: Largest number of jobs that wait while all threads run.
        max_batch: Largest number of jobs in a batch.
    """

    def __init__(self, max_running: int, max_waiting: int, max_batch: int = 1) -> None:
        self.max_running, self.max_waiting, self.max_batch = max_running, max_waiting, max_batch
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="c2c-serve")
        self._lock = threading.Lock()
        self._waiting: list[Job[Any]] = []
        self._num_batches = self._num_running = 0

    @property
    def num_running(self) -> int:
        """Number of jobs that a thread has taken and not finished."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Number of jobs that none has taken yet."""
        return len(self._waiting)

    def submit(self, job: "Job[Any]") -> None:
        """Run a job in a thread, as soon as one is free.

        Raises:
            QueueFullError: The queue is full.
        """
        with self._lock:
            free = (self.max_running - self._num_batches) * self.max_batch
            if len(self._waiting) >= self.max_waiting + free:
                raise QueueFullError
            self._waiting.append(job)
        job.future.add_done_callback(lambda future: self._leave(job))
        # One call per job; a batch leaves the calls of its other jobs nothing to do.
        self._pool.submit(self._run_batch)

    def close(self) -> None:
        """Drop waiting jobs and wait for the running ones."""
        for job in list(self._waiting):
            job.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run_batch(self) -> None:
        if 0 < len(self._waiting) < self.max_batch:
            time.sleep(_JOINING_SECONDS)
        with self._lock:
            taken = self._waiting[:1]
            if taken and taken[0].key is not None:
                taken = [job for job in self._waiting if job.key == taken[0].key][: self.max_batch]
            self._waiting = [job for job in self._waiting if job not in taken]
            # One that was cancelled just now does not start.
            jobs = [job for job in taken if job.future.set_running_or_notify_cancel()]
            if not jobs:
                return
            self._num_running += len(jobs)
            self._num_batches += 1
        try:
            jobs[0].work(jobs)
        except Exception as error:
            for job in jobs:
                job.finish(error)
        finally:
            with self._lock:
                self._num_batches -= 1

    def _leave(self, job: "Job[Any]") -> None:
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
            elif not job.future.cancelled():
                self._num_running -= 1


class Job(Generic[Result]):
    """One piece of work, seen from the event loop in which it is made.

    Args:
        queue: Whose threads do it.
        work: Called with this job, or with a batch of them; finishes each.
        task: What `work` needs to know of this job.
        key: Jobs of equal keys, whose `work` is the same, may be done as one batch; `None`: alone.

    Raises:
        QueueFullError: The queue is full.
    """

    def __init__(self, queue: JobQueue, work: "Work", task: Any = None, key: Hashable | None = None) -> None:
        self.work, self.task, self.key = work, task, key
        self.future: Future[Result] = Future()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.future.add_done_callback(lambda future: self.emit(None))
        queue.submit(self)

    # In the event loop.

    async def events(self) -> AsyncIterator[str | Result]:
        """Yield the pieces of text, then the result.

        Raises:
            Exception: Whatever the work raised.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        yield self.future.result()

    async def result(self) -> Result:
        """Return the result of work without pieces; a caller that leaves early cancels the job.

        Raises:
            Exception: Whatever the work raised.
        """
        try:
            await self._pieces.get()
            return self.future.result()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Take the job out of the queue, or let it stop at the next token."""
        self._cancelled.set()
        self.future.cancel()

    # In the worker thread.

    def emit(self, piece: str | None) -> None:
        """Hand on a piece of text; `None` ends them."""
        # The loop is closed where the server stopped before the thread did.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def is_cancelled(self) -> bool:
        """Return whether nobody waits for the result any more."""
        return self._cancelled.is_set()

    def finish(self, result: Result | Exception) -> None:
        """Set the result or the error; whatever comes later is ignored."""
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


Work: TypeAlias = Callable[[Sequence[Job[Any]]], None]
