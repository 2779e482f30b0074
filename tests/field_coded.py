"""A field-coded H.264 clip as camcorders write it (AVCHD, PAFF): every field is a packet, two are a frame.

No encoder at hand writes these, so the bits are put together here (ITU-T H.264, 7.3): intra, I_PCM, grey frames.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av

SIZE, FPS, FRAMES, GROUP = 64, 25, 50, 10


def write(path: Path) -> Path:
    """Write the clip; frame n is grey of level 16 + 4 * n."""
    delimiter = b"\0\0\0\1\x09\x10"
    header = _sequence() + _picture()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("h264", rate=2 * FPS)
        stream.width = stream.height = stream.codec_context.width = stream.codec_context.height = SIZE
        stream.codec_context.extradata = header
        stream.time_base = Fraction(1, 2 * FPS)
        for number in range(2 * FRAMES):
            is_key = number % (2 * GROUP) == 0
            packet = av.Packet(delimiter + (header if is_key else b"") + _field(number // 2, number % 2))
            packet.stream, packet.time_base = stream, Fraction(1, 2 * FPS)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, is_key
            out.mux(packet)
    return path


def _u(length: int, value: int) -> str:
    return f"{value:0{length}b}"


def _ue(value: int) -> str:
    """Return an unsigned Exp-Golomb code."""
    return "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"


def _unit(kind: int, bits: str) -> bytes:
    """Return a unit with its start code, stop bit and emulation prevention."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    unit, zeros = bytearray([kind]), 0
    for byte in int(bits, 2).to_bytes(len(bits) // 8, "big"):
        if zeros >= 2 and byte <= 3:
            unit.append(3)
            zeros = 0
        unit.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b"\0\0\0\1" + bytes(unit)


def _sequence() -> bytes:
    profile = _u(24, 77 << 16 | 30) + "".join(map(_ue, (0, 0, 0, 4, 1))) + "0"
    size = (
        _ue(SIZE // 16 - 1) + _ue(SIZE // 32 - 1) + "0" + "0" + "1" + "0"
    )  # fields, no mbaff, direct_8x8, no crop
    timing = "0000" + "1" + _u(32, 1) + _u(32, 2 * FPS) + "1"
    order = "000" + "1" + "1" + "".join(map(_ue, (0, 0, 10, 10, 0, 1)))  # nothing reordered, one frame buffered
    return _unit(0x67, profile + size + "1" + timing + order)


def _picture() -> bytes:
    return _unit(0x68, _ue(0) + _ue(0) + "00" + _ue(0) * 3 + "000" + _ue(0) * 3 + "000")


def _field(frame: int, is_bottom: int) -> bytes:
    in_group = frame % GROUP
    is_idr = in_group == 0 and not is_bottom
    bits = _ue(0) + _ue(7) + _ue(0) + _u(4, in_group) + "1" + str(is_bottom)
    bits += _ue(frame // GROUP % 2) if is_idr else ""
    bits += _u(8, 2 * in_group + is_bottom) + ("00" if is_idr else "0") + _ue(0)
    for _ in range(SIZE // 16 * SIZE // 32):
        bits += _ue(25)  # I_PCM
        bits += "0" * (-len(bits) % 8) + _u(8, min(235, 16 + 4 * frame)) * 256 + _u(8, 128) * 128
    return _unit(0x25 if is_idr else 0x21, bits)
