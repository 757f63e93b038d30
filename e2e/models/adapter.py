"""Writes an adapter (LoRA) of seeded values for SmolLM2-135M, as PEFT writes it.

No package has a small adapter of a small model, and a scenario needs one. It answers no question better; it
only answers differently. Scales and names are those of runtime/model/src/seeded/adapter.rs.
"""

import json
import math
import pathlib
import sys
from collections.abc import Iterator

from values import f32, safetensors, seeded

SEED, RANK, ALPHA = 31, 2, 2
# SmolLM2-135M: layers, and the rows of the projections that are changed; all have as many columns.
LAYERS, WIDTH = 30, 576
PROJECTIONS = {"q_proj": 576, "v_proj": 192}
SCALE, UP_SCALE = 3.0, 0.125


def tensors() -> Iterator[tuple[str, list[int], bytes]]:
    """The matrices, in the order of the file."""
    down_scale = f32(SCALE / f32(math.sqrt(WIDTH)))
    for layer in range(LAYERS):
        for projection, rows in PROJECTIONS.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            for name, shape, scale in ((down, [RANK, WIDTH], down_scale), (up, [rows, RANK], UP_SCALE)):
                yield name, shape, seeded(SEED, name, shape, scale)


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
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors()))
    (folder / "adapter_config.json").write_text(json.dumps(config(), indent=1))


if __name__ == "__main__":
    main()
