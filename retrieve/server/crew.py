"""Helper processes that decode for the server: a file of a stranger may hang or crash them, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Any

from svb.errors import InputError, SvbError, UsageError
from svb.retrieve.server.refusals import BusyError, TookTooLongError
from svb.retrieve.server.tied import kill_group, start_tied

# A line of JSON: an embedding of some thousand numbers fits, a runaway answer does not.
MAX_ANSWER_BYTES = 1 << 20
# Work that nobody waits for any more may go on for so long: to kill a helper costs the next one a model's loading.
GRACE_SECONDS = 10.0
# What a helper says of an error, and what is raised of it.
ERRORS = {"input": InputError, "usage": UsageError, "other": SvbError}


class Crew:
    """A few processes of `svb.retrieve.server.helper`, started when they are needed and kept for the next.

    Args:
        num_helpers: How many work at once.
        max_waiting: How many may wait for one of them, besides.
        time_limit_seconds: Of a piece of work; its process is killed then, and another takes its place.
    """

    def __init__(self, num_helpers: int, max_waiting: int, time_limit_seconds: float) -> None:
        self._places = asyncio.Semaphore(num_helpers)
        self._max_asked = num_helpers + max_waiting
        self._time_limit_seconds = time_limit_seconds
        self._asked = 0
        self._idle: list[Process] = []
        self._started: set[Process] = set()
        self._exchanges: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def do(self, task: str, **arguments: Any) -> Any:
        """Have a helper do one of its tasks, and return what it answers.

        Cancelled while it waits for a helper, the work is not done. Once begun it is given `GRACE_SECONDS` to end,
        then its helper is killed.

        Raises:
            BusyError: Too much is waiting, or the crew was closed.
            TookTooLongError: The time limit.
            InputError, UsageError: What the helper says is wrong with the file or the question.
            SvbError: What it says is wrong with the index or its model.
        """
        if self._asked >= self._max_asked:
            raise BusyError(f"{self._asked} files are being decoded or wait for it - try again in a moment")
        self._asked += 1
        try:
            await self._places.acquire()
            if self._is_closed:
                self._places.release()
                raise BusyError("the server ends")
            exchange = asyncio.create_task(self._exchange({"task": task, **arguments}))
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._end_exchange)
            try:
                return await asyncio.shield(exchange)
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_later(GRACE_SECONDS, exchange.cancel)
                raise
        finally:
            self._asked -= 1

    async def close(self) -> None:
        """End all helpers; what waits for one is refused."""
        self._is_closed = True
        for exchange in list(self._exchanges):
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in list(self._started)))

    def _end_exchange(self, exchange: asyncio.Task[Any]) -> None:
        self._exchanges.discard(exchange)
        self._places.release()
        if not exchange.cancelled():
            exchange.exception()  # who asked may have left: an error nobody takes is none to log

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
        command = (sys.executable, "-m", "svb.retrieve.server.helper")
        process = await start_tied(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        self._started.add(process)
        return process

    async def _end(self, process: Process) -> None:
        self._started.discard(process)
        await asyncio.shield(kill_group(process))


async def _ask(process: Process, message: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ConnectionError):  # a dead helper is noticed below
        process.stdin.write(json.dumps(message).encode() + b"\n")
        await process.stdin.drain()
    line = bytearray()
    while not line.endswith(b"\n"):
        part = await process.stdout.read(1 << 16)
        line += part
        if not part or len(line) > MAX_ANSWER_BYTES:
            raise InputError("decoding this file ended the process that did it - it is damaged, or made to harm")
    answer: dict[str, Any] = json.loads(line)
    return answer
