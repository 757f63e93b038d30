#!/usr/bin/env python3
"""Writes blocks of the GGUF types that are unpacked when a file is read, with their values by gguf.

Bytes are random; the scales among them are small numbers. Values are stored as the bits of their f32.
"""

import argparse
import json
import pathlib
import random

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
    arguments.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
