"""Makes reference answers of adapters (LoRA) with PEFT in float32 on the CPU.

Model and adapter are small and seeded: every value follows from a seed and the name of its tensor, by the
recipe of `runtime/model/src/seeded.rs` and `runtime/model/src/seeded/adapter.rs`, which this file repeats. So
nothing but JSON is stored: PEFT's own configuration file, the names and shapes of its tensors, and greedy
answers with the margin of each token.
"""

import argparse
import json
import os
import pathlib
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import safetensors
import torch
import transformers

SEED = 1
LAYERS, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, CONTEXT, VOCABULARY = 2, 4, 2, 16, 128, 256, 271
SCALE, BIAS_SCALE, UP_SCALE = 3.0, 0.3, 0.5
NEW_TOKENS = 24
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = [
    {"seed": 21, "rank": 4, "alpha": 8, "stabilised": False, "projections": ALL},
    {"seed": 22, "rank": 3, "alpha": 2, "stabilised": True, "projections": ["q_proj", "v_proj", "down_proj"]},
]
# The name of each projection in a GGUF file, whose values are seeded by it.
GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def fnv1a(text: str) -> int:
    """The 64 bits that a name adds to a seed."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def seeded(seed: int, name: str, shape: tuple[int, ...], scale: np.float32) -> torch.Tensor:
    """SplitMix64's outputs for the seed and the name, as numbers in -1..1, times a scale."""
    with np.errstate(over="ignore"):
        index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(seed ^ fnv1a(name)) + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    numbers = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return torch.from_numpy((numbers * scale).astype(np.float32)).reshape(shape)


def matrix(name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix of the model."""
    return seeded(SEED, name, shape, np.float32(SCALE) / np.sqrt(np.float32(shape[1])))


def unpaired(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys of a Llama as in transformers: files have the halves of a head element by element."""
    return stored.reshape(heads, HEAD_DIM // 2, 2, -1).transpose(1, 2).reshape(stored.shape)


def model(family: str) -> transformers.PreTrainedModel:
    """The seeded model of a family."""
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(value(family, name, tuple(parameter.shape)))
    return whole


def value(family: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a parameter by its name in transformers."""
    if name == "model.embed_tokens.weight":
        return matrix("token_embd.weight", shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    _, _, layer, block, projection, kind = name.split(".")
    part = GGUF[f"{block}.{projection}"]
    stored = f"blk.{layer}.{part}.{kind}"
    if kind == "bias":
        return seeded(SEED, stored, shape, np.float32(BIAS_SCALE))
    own = matrix(stored, shape)
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part)
    return unpaired(own, heads) if family == "llama" and heads else own


def adapted(family: str, adapter: dict) -> peft.PeftModel:
    """The model with an adapter of PEFT, whose values are seeded by the names that its file has."""
    config = peft.LoraConfig(
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        use_rslora=adapter["stabilised"],
        target_modules=adapter["projections"],
        task_type="CAUSAL_LM",
    )
    whole = peft.get_peft_model(model(family), config).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if ".lora_" not in name:
                continue
            stored, shape = name.replace(".default.", "."), tuple(parameter.shape)
            down = ".lora_A." in name
            scale = np.float32(SCALE) / np.sqrt(np.float32(shape[1])) if down else np.float32(UP_SCALE)
            parameter.copy_(seeded(adapter["seed"], stored, shape, scale))
    return whole


def written(whole: peft.PeftModel) -> dict:
    """What PEFT writes: its configuration, and the names and shapes of its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
        with safetensors.safe_open(pathlib.Path(folder, "adapter_model.safetensors"), "pt") as file:
            tensors = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    # A set's order differs from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    return {"config": config, "tensors": tensors}


def answer(whole: torch.nn.Module, ids: list[int]) -> dict:
    """Greedy tokens with their margins. The whole sequence is computed for each token, without a cache."""
    sequence, margins = list(ids), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = whole(torch.tensor([sequence])).logits[0, -1]
        best, second = torch.topk(logits, 2).values.tolist()
        margins.append(round(best - second, 6))
        sequence.append(int(logits.argmax()))
        if sequence[-1] == 2:
            break
    return {"ids": ids, "greedy": sequence[len(ids) :], "margins": margins}


def main() -> None:
    """Writes the answers of each model, plain and with each adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    prompts = [[3 + (i * 31 + salt * 17) % 250 for i in range(length)] for length, salt in ((5, 1), (40, 2))]
    models = []
    for family in ("llama", "qwen2"):
        plain = [answer(model(family), ids) for ids in prompts]
        adapters = []
        for adapter in ADAPTERS:
            whole = adapted(family, adapter)
            adapters.append(adapter | written(whole) | {"cases": [answer(whole, ids) for ids in prompts]})
        models.append({"family": family, "plain": plain, "adapters": adapters})
    made_with = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    out.write_text(json.dumps({"made_with": made_with, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
