"""An owned ffmpeg process, and what cuts its output into lines and pictures."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

# More than a pipe holds: one read empties it, so that what was written first is also seen first.
READ_BYTES = 1 << 20

# A line of ffmpeg's log or of times longer than this is no longer looked at.
LINE_BYTES = 1 << 16

# `level` marks each line of the log; `verbose` tells the exact time base.
GLOBAL_OPTIONS = (
    *("-nostdin", "-hide_banner", "-nostats"),
    *("-v", "repeat+level+verbose", "-filter_complex_threads", "1"),
)


class FfmpegProcess:
    """An ffmpeg process that cannot outlive the `with`, nor block on a pipe that nobody reads."""

    def __init__(self, arguments: Callable[[int], list[str]], video_fd: int) -> None:
        # The place in the file is shared with the processes that read it before.
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

        One loop instead of threads: while the caller is busy nothing is read, ffmpeg waits and memory
        stays bounded; when the caller is back, whatever ffmpeg is stuck on is read. What explains a
        picture is written before it: so the log is read first, then times, then pictures.
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
        # A process that closed its pipes is done; one that lingers is killed on the way out.
        self._wait_a_little()

    def _wait_a_little(self) -> None:
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return


class Lines:
    """Cuts bytes into lines; holds no more than one."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-LINE_BYTES:]
        return [line.decode("utf-8", "replace").rstrip("\r") for line in lines]


class Pictures:
    """Cuts bytes into PAM pictures.

    Attributes:
        ready: Whole pictures, `(H, W, 4)` uint8 RGB and alpha, not yet taken.
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
            # A match looks into the buffer, and what is looked into cannot be cut.
            del header
            end = start + width * height * 4
            if len(self._bytes) < end:
                return
            picture = np.frombuffer(bytes(self._bytes[start:end]), dtype=np.uint8)
            self.ready.append(picture.reshape(height, width, 4))
            del self._bytes[:end]
