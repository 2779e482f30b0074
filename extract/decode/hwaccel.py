"""Whether this machine's ffmpeg can decode in hardware: asked up front, since it falls back in silence."""

from __future__ import annotations

import subprocess

import imageio_ffmpeg

from svb.errors import UsageError

# A driver that hangs must not hang the command line.
TIMEOUT_SECONDS = 30.0

_ADVICE = "leave out --hwaccel, or set IMAGEIO_FFMPEG_EXE to an ffmpeg built with it"


def require_hwaccel(name: str) -> None:
    """Make sure that ffmpeg knows a hardware decoder and that its device opens.

    Which codecs the device decodes only shows with the video: ffmpeg decodes the others in software.

    Args:
        name: As `ffmpeg -hwaccels` prints it, such as `cuda`.

    Raises:
        UsageError: It does not; names what ffmpeg said.
    """
    listed, _ = _ask("-hwaccels")
    known = listed.partition(":\n")[2].split()
    if name not in known:
        raise UsageError(
            f"ffmpeg knows no hardware decoder {name!r} - expected one of {', '.join(known) or 'none at all'}; "
            f"{_ADVICE}"
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
            f"{', '.join(known)}, and each needs its device and driver; {_ADVICE}"
        )


def _ask(*arguments: str) -> tuple[str, int]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-v", "error", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_SECONDS:.0f} s", 1
    return done.stdout.decode("utf-8", "replace"), done.returncode
