"""Child processes that cannot outlive the server, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import Process

# Asks the kernel to kill this process when its parent dies, which outlasts an exec; then becomes the program.
_TIE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


async def start_tied(
    *command: str, stdin: int, stdout: int, stderr: int, pass_fds: tuple[int, ...] = ()
) -> Process:
    """Start a program that the kernel kills when this process dies; a name without a folder is looked for in PATH.

    The process leads a group of its own: Ctrl-C reaches the server alone, and `kill_group` takes what it started.
    """
    if sys.platform == "linux":
        # -I -S: neither the user's site-packages nor the working folder may change what this runs.
        command = (sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command)
    return await asyncio.create_subprocess_exec(
        *command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, start_new_session=True
    )


async def kill_group(process: Process) -> None:
    """Kill a process of `start_tied` and what it started, and wait for its end; one that has ended is no harm."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
