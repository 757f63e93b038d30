#!/usr/bin/env python3
"""Writes modules of quantised checkpoints with the values of their weights.

Codes, zeros and scales are drawn, packed as each format describes, and multiplied: the tests unpack them and
must find the same values to the last bit. Only the standard library is used. The formats are those of the
fine-grained FP8 checkpoints of DeepSeek and Qwen, of GPTQ, of AWQ and of compressed-tensors.
"""

import argparse
import json
import pathlib
import random
import struct

ROWS, COLS, GROUP = 24, 64, 32
MODULE = "model.layers.0.mlp.up_proj"
# Which of the eight rows of a number each four bits hold, in the files of AWQ.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def f32(value):
    """The value rounded to float32; a product of two of them is exact before."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def f16(value):
    return struct.unpack("<e", struct.pack("<e", value))[0]


def bf16(value):
    """The value with the lower half of its float32 cut off."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0] & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def e4m3(byte):
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    magnitude = fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def floats(values, kind):
    """The bytes of scales in a type of safetensors."""
    if kind == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{'e' if kind == 'F16' else 'f'}", *values)


def tensor(kind, shape, data):
    return {"dtype": kind, "shape": shape, "data": data.hex()}


def words(values):
    return struct.pack(f"<{len(values)}I", *values)


def join(codes, bits=4):
    """One number of codes, the first in its lowest bits."""
    return sum(code << (index * bits) for index, code in enumerate(codes))


def in_words(codes, bits):
    """Codes in numbers of 32 bits, with zeros after the last."""
    per_word = 32 // bits
    padded = codes + [0] * (-len(codes) % per_word)
    return [join(padded[at : at + per_word], bits) for at in range(0, len(padded), per_word)]


def column(matrix, index):
    return [row[index] for row in matrix]


def half_scale(chance):
    return f16(chance.uniform(0.002, 0.02))


def case(config, tensors, dtype, values):
    rows, cols = len(values), len(values[0])
    flat = [value for row in values for value in row]
    return {
        "config": config,
        "tensors": {f"{MODULE}.{name}": about for name, about in tensors.items()},
        "becomes": dtype,
        "shape": [rows, cols],
        "values": struct.pack(f"<{len(flat)}f", *flat).hex(),
    }


def fp8(chance, config, name, kind, parts, scale, dtype):
    """Weights with a scale for each part of so many rows and columns."""
    rows, cols = ROWS, COLS
    height, width = parts
    down, across = -(-rows // height), -(-cols // width)
    codes = [
        [chance.choice([b for b in range(256) if b & 127 != 127]) for _ in range(cols)] for _ in range(rows)
    ]
    scales = [[scale(chance) for _ in range(across)] for _ in range(down)]
    values = [
        [f32(e4m3(codes[r][c]) * scales[r // height][c // width]) for c in range(cols)] for r in range(rows)
    ]
    flat = [value for row in scales for value in row]
    shape = [] if len(flat) == 1 else [down, across]
    if kind == "F8_E8M0":
        data = bytes(struct.unpack("<I", struct.pack("<f", value))[0] >> 23 for value in flat)
    else:
        data = floats(flat, kind)
    tensors = {
        "weight": tensor("F8_E4M3", [rows, cols], b"".join(bytes(row) for row in codes)),
        name: tensor(kind, shape, data),
        "input_scale": tensor("F32", [], floats([0.5], "F32")),
    }
    return case(config, tensors, dtype, values)


def grouped(chance, group, zero, order=None, top=15):
    """Codes, zeros and scales by row, and the weights."""
    groups = COLS // group
    codes = [[chance.randint(0, top) for _ in range(COLS)] for _ in range(ROWS)]
    zeros = [[zero(chance) for _ in range(groups)] for _ in range(ROWS)]
    scales = [[half_scale(chance) for _ in range(groups)] for _ in range(ROWS)]
    own = order or [c // group for c in range(COLS)]
    values = [
        [f32((codes[r][c] - zeros[r][own[c]]) * scales[r][own[c]]) for c in range(COLS)] for r in range(ROWS)
    ]
    return codes, zeros, scales, values


def gptq(chance, zero, dtype, group=GROUP, shuffled=False, second=False):
    order = [chance.randrange(COLS // group) for _ in range(COLS)] if shuffled else None
    codes, zeros, scales, values = grouped(chance, group, zero, order)
    groups, less = COLS // group, 0 if second else 1
    packed = [join(codes[r][c : c + 8]) for c in range(0, COLS, 8) for r in range(ROWS)]
    # A zero of 16 is stored as 15: four bits hold the zero less one.
    stored = [
        join([zeros[r + i][g] - less for i in range(8)]) for g in range(groups) for r in range(0, ROWS, 8)
    ]
    by_group = [scales[r][g] for g in range(groups) for r in range(ROWS)]
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1 if groups == 1 else group,
        "sym": dtype == "Q4_0",
    }
    config |= {"checkpoint_format": "gptq_v2"} if second else {"desc_act": shuffled}
    index = order or [c // group for c in range(COLS)]
    tensors = {
        "qweight": tensor("I32", [COLS // 8, ROWS], words(packed)),
        "qzeros": tensor("I32", [groups, ROWS // 8], words(stored)),
        "scales": tensor("F16", [groups, ROWS], floats(by_group, "F16")),
        "g_idx": tensor("I32", [COLS], words(index)),
    }
    return case(config, tensors, dtype, values)


def awq(chance):
    codes, zeros, scales, values = grouped(chance, GROUP, lambda c: c.randint(0, 15))
    groups = COLS // GROUP

    def interleaved(numbers):
        return [join([numbers[at + i] for i in AWQ_ORDER]) for at in range(0, ROWS, 8)]

    packed = [word for c in range(COLS) for word in interleaved(column(codes, c))]
    stored = [word for g in range(groups) for word in interleaved(column(zeros, g))]
    by_group = [scales[r][g] for g in range(groups) for r in range(ROWS)]
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    tensors = {
        "qweight": tensor("I32", [COLS, ROWS // 8], words(packed)),
        "qzeros": tensor("I32", [groups, ROWS // 8], words(stored)),
        "scales": tensor("F16", [groups, ROWS], floats(by_group, "F16")),
    }
    return case(config, tensors, "Q5_0", values)


def compressed(kind, weights):
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def packed(chance, bits, dtype, group=GROUP, zero=None, shuffled=False):
    order = [chance.randrange(COLS // group) for _ in range(COLS)] if shuffled else None
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    codes, zeros, scales, values = grouped(chance, group, zero or (lambda _: middle), order, top)
    groups = COLS // group
    flat = [scale for row in scales for scale in row]
    tensors = {
        "weight_packed": tensor(
            "I32", [ROWS, COLS * bits // 32], words([w for row in codes for w in in_words(row, bits)])
        ),
        "weight_scale": tensor("F16", [ROWS, groups], floats(flat, "F16")),
        "weight_shape": tensor("I64", [2], struct.pack("<2q", ROWS, COLS)),
    }
    if zero:
        columns = [in_words(column(zeros, g), bits) for g in range(groups)]
        stored = [columns[g][at] for at in range(len(columns[0])) for g in range(groups)]
        tensors["weight_zero_point"] = tensor("I32", [len(columns[0]), groups], words(stored))
    if order:
        tensors["weight_g_idx"] = tensor("I32", [COLS], words(order))
    return case(compressed("pack-quantized", {"type": "int", "num_bits": bits}), tensors, dtype, values)


def signed(chance, kind, scale, dtype, whole=False, zero=None):
    """Bytes with a scale for each row, or one for the tensor."""
    codes = [[chance.randint(-128, 127) for _ in range(COLS)] for _ in range(ROWS)]
    count = 1 if whole else ROWS
    scales, zeros = [scale(chance) for _ in range(count)], [zero(chance) if zero else 0 for _ in range(count)]
    values = [
        [f32((code - zeros[r % count]) * scales[r % count]) for code in row] for r, row in enumerate(codes)
    ]
    shape = [1] if whole else [ROWS, 1]
    tensors = {
        "weight": tensor(
            "I8", [ROWS, COLS], struct.pack(f"<{ROWS * COLS}b", *[c for row in codes for c in row])
        ),
        "weight_scale": tensor(kind, shape, floats(scales, kind)),
    }
    if zero:
        tensors["weight_zero_point"] = tensor("I8", shape, struct.pack(f"<{count}b", *zeros))
    return case(compressed("int-quantized", {"type": "int", "num_bits": 8}), tensors, dtype, values)


def cases():
    chance = random.Random(11)
    blocks = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [16, 48],
    }
    plain = {"quant_method": "fp8", "activation_scheme": "static"}
    eight = compressed("float-quantized", {"type": "float", "num_bits": 8})
    any_scale = lambda c: f32(c.uniform(0.001, 0.01))  # noqa: E731
    power = lambda c: 2.0 ** c.randint(-12, -4)  # noqa: E731
    brief = lambda c: bf16(c.uniform(0.001, 0.01))  # noqa: E731
    return {
        "fp8_blocks": fp8(chance, blocks, "weight_scale_inv", "F32", (16, 48), any_scale, "F32"),
        "fp8_blocks_of_powers": fp8(chance, blocks, "weight_scale_inv", "F32", (16, 48), power, "BF16"),
        "fp8_exponents": fp8(chance, blocks, "weight_scale_inv", "F8_E8M0", (16, 48), power, "BF16"),
        "fp8_tensor": fp8(chance, plain, "weight_scale", "F32", (ROWS, COLS), any_scale, "F32"),
        "fp8_rows": fp8(chance, eight, "weight_scale", "BF16", (1, COLS), brief, "F32"),
        "gptq_symmetric": gptq(chance, lambda _: 8, "Q4_0"),
        "gptq_zeros": gptq(chance, lambda c: c.randint(1, 16), "Q5_0"),
        "gptq_order": gptq(chance, lambda c: c.randint(1, 16), "F32", shuffled=True),
        "gptq_second_version": gptq(chance, lambda c: c.randint(0, 15), "Q5_0", group=COLS, second=True),
        "awq": awq(chance),
        "packed_4": packed(chance, 4, "Q4_0"),
        "packed_4_zeros": packed(chance, 4, "Q5_0", zero=lambda c: c.randint(0, 15)),
        "packed_4_order": packed(chance, 4, "F32", shuffled=True),
        "packed_4_short_groups": packed(chance, 4, "F32", group=16),
        "packed_8": packed(chance, 8, "Q8_0", group=COLS),
        "int8_rows": signed(chance, "BF16", brief, "Q8_0"),
        "int8_tensor": signed(chance, "F32", any_scale, "F32", whole=True),
        "int8_zeros": signed(chance, "F16", half_scale, "F32", zero=lambda c: c.randint(-9, 9)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    lines = [f"{json.dumps(name)}: {json.dumps(made)}" for name, made in cases().items()]
    arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
