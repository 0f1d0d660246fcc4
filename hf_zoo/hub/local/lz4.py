"""LZ4 frames, read in pure Python: Xet clients compress what they send, and the standard library has no LZ4.

The format: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md and lz4_Block_format.md.
"""

from __future__ import annotations

_MAGIC = b"\x04\x22\x4d\x18"


def decompress(frame: bytes, size: int) -> bytes:
    """Decompress one frame.

    Args:
        frame: The whole frame.
        size: The bytes it must unpack to, so that a small frame cannot fill the memory.

    Returns:
        The content; checksums are not looked at, since a stronger digest follows.

    Raises:
        ValueError: If it is no frame, or unpacks to another size.
    """
    try:
        out = _frame(frame, size)
    except IndexError as error:
        raise ValueError("the LZ4 frame is truncated") from error
    if len(out) != size:
        raise ValueError(f"the LZ4 frame unpacks to {len(out)} bytes instead of {size}")
    return bytes(out)


def _frame(frame: bytes, size: int) -> bytearray:
    """Unpack the blocks of a frame."""
    flags = frame[4]
    if frame[:4] != _MAGIC or flags >> 6 != 1:
        raise ValueError("no LZ4 frame")
    position = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while True:
        header = int.from_bytes(frame[position : position + 4], "little")
        if header == 0 or position + 4 > len(frame):
            return out
        length = header & 0x7FFFFFFF
        block = frame[position + 4 : position + 4 + length]
        if len(block) != length:
            raise ValueError("the LZ4 frame is truncated")
        if header >> 31:
            out += block
        else:
            # Independent blocks never look back past their beginning, so one history serves both kinds.
            _block(block, out, size)
        if len(out) > size:
            raise ValueError(f"the LZ4 frame unpacks to more than {size} bytes")
        position += 4 + length + (4 if flags & 16 else 0)


def _block(block: bytes, out: bytearray, most: int) -> None:
    """Append one compressed block: literals, then a copy of what came before, again and again."""
    position, end = 0, len(block)
    while position < end:
        token = block[position]
        position += 1
        literals = token >> 4
        if literals == 15:
            while True:
                more = block[position]
                position += 1
                literals += more
                if more != 255:
                    break
        out += block[position : position + literals]
        position += literals
        if position >= end:
            break
        offset = block[position] | block[position + 1] << 8
        position += 2
        length = (token & 15) + 4
        if length == 19:
            while True:
                more = block[position]
                position += 1
                length += more
                if more != 255:
                    break
        start = len(out) - offset
        if offset == 0 or start < 0 or len(out) + length > most:
            raise ValueError("the LZ4 frame copies from before its beginning or past its end")
        if offset >= length:
            out += out[start : start + length]
        else:  # the copy overlaps what it writes: it repeats the last `offset` bytes
            out += (out[start:] * (length // offset + 1))[:length]
