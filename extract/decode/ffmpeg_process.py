"""Runs the ffmpeg program: its process and its output, and the hardware that it can decode with."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from svb.errors import UsageError

# More than a pipe holds: one read empties it, so that lines are seen in the order of writing.
READ_BYTES = 1 << 20

# Longer lines are cut.
LINE_BYTES = 1 << 16

# `level` marks each line of the log; `verbose` prints the exact time base.
GLOBAL_OPTIONS = (
    *("-nostdin", "-hide_banner", "-nostats"),
    *("-v", "repeat+level+verbose", "-filter_complex_threads", "1"),
)


class FfmpegProcess:
    """An ffmpeg process that ends with the `with` block and never blocks on a pipe that nobody reads."""

    def __init__(self, arguments: Callable[[int], list[str]], video_fd: int) -> None:
        # Earlier processes have moved the file's position, which all of them share.
        os.lseek(video_fd, 0, os.SEEK_SET)
        times_read, times_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [imageio_ffmpeg.get_ffmpeg_exe(), *GLOBAL_OPTIONS, *arguments(times_write)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(video_fd, times_write),
            )
        except BaseException:
            os.close(times_read)
            raise
        finally:
            os.close(times_write)
        self._times = os.fdopen(times_read, "rb", buffering=0)

    def __enter__(self) -> FfmpegProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr, self._times):
            if pipe is not None:
                pipe.close()

    def output(self) -> Iterator[tuple[str, bytes]]:
        """Yield `("log" | "times" | "pictures", bytes)` until ffmpeg has closed all three.

        While the caller is busy nothing is read, so ffmpeg waits and memory stays bounded. ffmpeg writes
        the log and the time of a picture before the picture, so they are read in that order.
        """
        assert self._process.stdout is not None and self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stderr, selectors.EVENT_READ, (0, "log"))
            selector.register(self._times, selectors.EVENT_READ, (1, "times"))
            selector.register(self._process.stdout, selectors.EVENT_READ, (2, "pictures"))
            while selector.get_map():
                for key, _ in sorted(selector.select(), key=lambda ready: ready[0].data):
                    data = os.read(key.fd, READ_BYTES)
                    if data:
                        yield key.data[1], data
                    else:
                        selector.unregister(key.fileobj)
        # A process that closed its pipes is done; if it lingers it is killed on exit.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


class Lines:
    """Cuts bytes into lines; keeps at most one unfinished line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-LINE_BYTES:]
        return [line.decode("utf-8", "replace").rstrip("\r") for line in lines]


class PamPictures:
    """Cuts bytes into PAM pictures.

    Attributes:
        ready: Whole pictures that wait to be taken: `(H, W, 4)` uint8, RGB and alpha.
    """

    _HEADER = re.compile(rb"P7\nWIDTH (\d+)\nHEIGHT (\d+)\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n")

    def __init__(self) -> None:
        self.ready: deque[NDArray[np.uint8]] = deque()
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data
        while True:
            header = self._HEADER.match(self._bytes)
            if header is None:
                return
            width, height, start = int(header[1]), int(header[2]), header.end()
            # A match holds the buffer, which then cannot be cut.
            del header
            end = start + width * height * 4
            if len(self._bytes) < end:
                return
            picture = np.frombuffer(bytes(self._bytes[start:end]), dtype=np.uint8)
            self.ready.append(picture.reshape(height, width, 4))
            del self._bytes[:end]


# A driver that hangs must not hang the command line.
HWACCEL_TIMEOUT_SECONDS = 30.0

_HWACCEL_ADVICE = "leave out --hwaccel, or set IMAGEIO_FFMPEG_EXE to an ffmpeg built with it"


def require_hwaccel(name: str) -> None:
    """Check that ffmpeg knows a hardware decoder and that its device opens.

    ffmpeg would fall back to software silently. It still does so for codecs that the device cannot decode.

    Args:
        name: As `ffmpeg -hwaccels` prints it, such as `cuda`.

    Raises:
        UsageError: ffmpeg does not know it, or cannot open the device; quotes ffmpeg.
    """
    listed, _ = _ask("-hwaccels")
    known = listed.partition(":\n")[2].split()
    if name not in known:
        raise UsageError(
            f"ffmpeg knows no hardware decoder {name!r} - expected one of {', '.join(known) or 'none at all'}; "
            f"{_HWACCEL_ADVICE}"
        )
    arguments = (
        "-init_hw_device",
        name,
        "-f",
        "lavfi",
        "-i",
        "color=size=16x16",
        "-frames:v",
        "1",
        "-f",
        "null",
        "-",
    )
    said, exit_code = _ask(*arguments)
    if exit_code != 0:
        words = "; ".join(line.strip() for line in said.splitlines()[:2]) or f"exit code {exit_code}"
        raise UsageError(
            f"ffmpeg cannot open the hardware decoder {name!r} on this machine: {words} - this ffmpeg knows "
            f"{', '.join(known)}, and each needs its device and driver; {_HWACCEL_ADVICE}"
        )


def run_to_end(arguments: Sequence[str], video_fd: int, time_limit_seconds: float) -> tuple[int, list[str]]:
    """Run ffmpeg on an open file; return its exit code and the lines that it wrote to stderr.

    Args:
        arguments: All but the program; its standard input and output are closed.
        video_fd: The file, which ffmpeg reads from the start as `fd:`.
        time_limit_seconds: ffmpeg is killed when it takes longer.

    Raises:
        subprocess.TimeoutExpired: It took longer.
    """
    # Whoever has read the file before has moved its position.
    os.lseek(video_fd, 0, os.SEEK_SET)
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(video_fd,),
        timeout=time_limit_seconds,
        check=False,
    )
    return done.returncode, done.stderr.decode("utf-8", "replace").strip().splitlines()


def _ask(*arguments: str) -> tuple[str, int]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-v", "error", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=HWACCEL_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {HWACCEL_TIMEOUT_SECONDS:.0f} s", 1
    return done.stdout.decode("utf-8", "replace"), done.returncode
