"""Writes an adapter (LoRA) of seeded values for SmolLM2-135M, as PEFT writes it.

No package has a small adapter of a small model, and a scenario needs one. It answers no question better; it
only answers differently. The recipe of the values is that of runtime/model/src/seeded/adapter.rs. Only the
standard library is used; the files are the same on every machine, so that they have digests.
"""

import array
import json
import math
import pathlib
import struct
import sys

from seeded import SCALE, element, f32, fnv1a

SEED, RANK, ALPHA = 31, 2, 2
# SmolLM2-135M: layers, and the rows of the projections that are changed; all have as many columns.
LAYERS, WIDTH = 30, 576
PROJECTIONS = {"q_proj": 576, "v_proj": 192}
UP_SCALE = 0.125


def values(name: str, shape: list[int], scale: float) -> bytes:
    """The bytes of a tensor, float32 in little endian."""
    start = SEED ^ fnv1a(name)
    numbers = array.array("f", (element(start, index) * scale for index in range(math.prod(shape))))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def safetensors() -> bytes:
    """The file of the matrices: the length of a header, the header in JSON, the tensors."""
    header, tensors, end = {}, [], 0
    for layer in range(LAYERS):
        for projection, rows in PROJECTIONS.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            down_scale = f32(SCALE / f32(math.sqrt(WIDTH)))
            for name, shape, scale in ((down, [RANK, WIDTH], down_scale), (up, [rows, RANK], UP_SCALE)):
                tensors.append(values(name, shape, scale))
                start, end = end, end + len(tensors[-1])
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors)


def config() -> dict:
    """The file adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def main() -> None:
    """Writes the files into the folder that is named."""
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(safetensors())
    (folder / "adapter_config.json").write_text(json.dumps(config(), indent=1))


if __name__ == "__main__":
    main()
