"""The seeded values of models that are made here, and the safetensors file that holds them.

The recipe of the values is that of runtime/model/src/seeded.rs. Only the standard library is used; the files
are the same on every machine, so that they have digests.
"""

import array
import json
import math
import struct
import sys
from collections.abc import Iterable

MASK = 2**64 - 1


def f32(value: float) -> float:
    """The value rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def fnv1a(text: str) -> int:
    """The 64-bit FNV-1a hash of a tensor's name."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def element(start: int, index: int) -> float:
    """One value of the sequence that begins at `start`, between -1 and 1."""
    z = (start + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 40) / 2**23 - 1.0


def seeded(seed: int, name: str, shape: list[int], scale: float) -> bytes:
    """The bytes of the tensor `name`: values between -scale and scale."""
    start = seed ^ fnv1a(name)
    return little_endian(element(start, index) * scale for index in range(math.prod(shape)))


def little_endian(numbers: Iterable[float]) -> bytes:
    """The bytes of numbers, float32 in little endian."""
    values = array.array("f", numbers)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def safetensors(tensors: Iterable[tuple[str, list[int], bytes]]) -> bytes:
    """A file of tensors (name, shape, bytes): the length of a header, the header in JSON, the tensors."""
    header, contents, end = {}, [], 0
    for name, shape, content in tensors:
        contents.append(content)
        start, end = end, end + len(content)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(contents)
