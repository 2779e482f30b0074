"""Child processes that die with the server, and a pool of workers that decode: a bad file harms only a worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Any

from svb.errors import InputError, SvbError, UsageError
from svb.retrieve.server.http import BusyError, TookTooLongError

# This asks the kernel to kill the process when its parent dies, even after an exec; then it becomes the program.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""

# What Python runs as a worker.
WORKER: tuple[str, ...] = ("-m", "svb.retrieve.server.worker")
# An answer is a line of JSON: an embedding of some thousand numbers fits, a runaway answer does not.
MAX_ANSWER_BYTES = 1 << 20
# Work that nobody waits for may go on this long, because the worker that replaces a killed one loads a model.
GRACE_SECONDS = 10.0
# The kinds of error that a worker names, and what is raised for each.
ERRORS = {"input": InputError, "usage": UsageError, "other": SvbError}


async def start_child(
    *command: str, stdin: int, stdout: int, stderr: int, pass_fds: tuple[int, ...] = ()
) -> Process:
    """Start a program that the kernel kills when this process dies; a name without a folder is looked up in PATH.

    The process leads a group of its own: Ctrl-C reaches the server alone, and `kill_child` also ends what the
    process started.
    """
    if sys.platform == "linux":
        # -I -S: neither the user's site-packages nor the working folder may change what this runs.
        command = (sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command)
    return await asyncio.create_subprocess_exec(
        *command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, start_new_session=True
    )


async def kill_child(process: Process) -> None:
    """Kill a process of `start_child` and what it started, and wait for its end; it may have ended already."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


class WorkerPool:
    """A few worker processes, started when they are needed and kept for the next task.

    Args:
        num_workers: How many work at once.
        max_waiting: How many tasks may wait for a worker.
        time_limit_seconds: A worker whose task takes longer is killed, and another takes its place.
    """

    def __init__(self, num_workers: int, max_waiting: int, time_limit_seconds: float) -> None:
        self._places = asyncio.Semaphore(num_workers)
        self._max_asked = num_workers + max_waiting
        self._time_limit_seconds = time_limit_seconds
        self._num_asked = 0
        self._idle: list[Process] = []
        self._started: set[Process] = set()
        self._exchanges: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def do(self, task: str, **arguments: Any) -> Any:
        """Have a worker do one of its tasks, and return what it answers.

        A task that is cancelled while it waits for a worker never starts. One that has started gets `GRACE_SECONDS`
        to end, then its worker is killed.

        Raises:
            BusyError: Too many tasks are waiting, or the pool was closed.
            TookTooLongError: The task reached the time limit.
            InputError, UsageError: The worker says that the file or the request is at fault.
            SvbError: The worker says that the index or its model is at fault.
        """
        if self._num_asked >= self._max_asked:
            raise BusyError(f"{self._num_asked} files are being decoded or are waiting - try again in a moment")
        self._num_asked += 1
        try:
            await self._places.acquire()
            if self._is_closed:
                self._places.release()
                raise BusyError("the server is shutting down")
            exchange = asyncio.create_task(self._exchange({"task": task, **arguments}))
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._end_exchange)
            try:
                return await asyncio.shield(exchange)
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_later(GRACE_SECONDS, exchange.cancel)
                raise
        finally:
            self._num_asked -= 1

    async def close(self) -> None:
        """End all workers and refuse the tasks that wait for one."""
        self._is_closed = True
        for exchange in list(self._exchanges):
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in list(self._started)))

    def _end_exchange(self, exchange: asyncio.Task[Any]) -> None:
        self._exchanges.discard(exchange)
        self._places.release()
        if not exchange.cancelled():
            exchange.exception()  # whoever asked may have left: nobody else takes this error

    async def _exchange(self, message: dict[str, Any]) -> Any:
        process = await self._take()
        try:
            answer = await asyncio.wait_for(_ask(process, message), self._time_limit_seconds)
        except asyncio.TimeoutError:
            raise TookTooLongError(
                f"decoding took longer than {self._time_limit_seconds:g} s and was ended - "
                "send a shorter video, or a span of it"
            ) from None
        else:
            self._idle.append(process)
        finally:
            if process not in self._idle:
                await self._end(process)
        if "error" in answer:
            raise ERRORS[answer["kind"]](answer["error"])
        return answer["result"]

    async def _take(self) -> Process:
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
            await self._end(process)
        process = await start_child(sys.executable, *WORKER, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        self._started.add(process)
        return process

    async def _end(self, process: Process) -> None:
        self._started.discard(process)
        await asyncio.shield(kill_child(process))


async def _ask(process: Process, message: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ConnectionError):  # the loop below notices a dead worker
        process.stdin.write(json.dumps(message).encode() + b"\n")
        await process.stdin.drain()
    line = bytearray()
    while not line.endswith(b"\n"):
        part = await process.stdout.read(1 << 16)
        line += part
        if not part or len(line) > MAX_ANSWER_BYTES:
            raise InputError("the process that decoded this file died - the file is damaged or malicious")
    answer: dict[str, Any] = json.loads(line)
    return answer
