#!/usr/bin/env python3
"""Writes blocks of the GGUF types that are unpacked when a file is read, with their values by gguf.

Bytes are random; the scales among them are small numbers. Values are stored as the bits of their f32.
"""

import argparse
import json
import pathlib
import random
import struct

import gguf
import numpy as np

# For each type the bytes of a block, and where its f16 scales are.
TYPES = {
    "Q5_1": (24, [0, 2]),
    "Q2_K": (84, [80, 82]),
    "Q3_K": (110, [108]),
    "IQ4_NL": (18, [0]),
    "IQ4_XS": (136, [0]),
    "MXFP4": (17, []),
}
BLOCKS = 2


def block(chance, kind):
    size, scales = TYPES[kind]
    data = bytearray(chance.randbytes(size))
    for at in scales:
        data[at : at + 2] = np.float16(chance.uniform(-0.01, 0.01)).tobytes()
    if kind == "MXFP4":
        data[0] = 118 + chance.randrange(8)
    return bytes(data)


def q8_k():
    """Blocks of Q8_K with their values. The package has no function for the type."""
    chance = random.Random(20)
    data, values = b"", b""
    for _ in range(BLOCKS):
        scale = struct.unpack("<f", struct.pack("<f", chance.uniform(-0.01, 0.01)))[0]
        quants = [chance.randint(-128, 127) for _ in range(256)]
        sums = [sum(quants[at : at + 16]) for at in range(0, 256, 16)]
        data += struct.pack("<f256b16h", scale, *quants, *sums)
        values += struct.pack("<256f", *[scale * quant for quant in quants])
    return {"stored": data.hex(), "values": values.hex()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    chance = random.Random(5)
    made = {}
    for kind in TYPES:
        data = b"".join(block(chance, kind) for _ in range(BLOCKS))
        stored = np.frombuffer(data, dtype=np.uint8).reshape(1, -1)
        values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
        bits = values.astype("<f4").tobytes().hex()
        made[kind] = {"stored": data.hex(), "values": bits}
    made["Q8_K"] = q8_k()
    arguments.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
