#!/usr/bin/env python3
"""Writes the logits of small seeded models of every family, computed by transformers in float32.

The models are those of runtime/model/src/seeded.rs, whose recipe is repeated here: every tensor depends on
nothing but the seed and its name in a GGUF file. A file holds one case: the configuration and tensor names of
the checkpoint that transformers would write, the ids of a text, and the logits after some of its tokens.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open

SEED = 1
SCALE, BIAS_SCALE = 3.0, 0.3
VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, CONTEXT = 271, 4, 2, 16, 128, 256
QUERY, NARROW = HEADS * HEAD_DIM, HEADS * HEAD_DIM // 4 * 3
WINDOW, ORIGINAL, PAIRS = 16, 32, 6
MASK = (1 << 64) - 1
# Positions whose logits are kept: the first, one within every window, and one far beyond them.
POSITIONS = [0, 9, 39]


def fnv1a(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def elements(name, count):
    """SplitMix64 as numbers in [-1, 1)."""
    start = np.uint64(SEED ^ fnv1a(name))
    with np.errstate(over="ignore"):
        z = start + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def matrix(name, rows, cols):
    scale = np.float32(SCALE) / np.sqrt(np.float32(cols))
    return (elements(name, rows * cols) * scale).reshape(rows, cols)


def values(name, shape, plain_norms):
    """The tensor of a GGUF file, in the shape of the checkpoint's."""
    if len(shape) == 2:
        return matrix(name, *shape)
    if name.endswith(".bias"):
        return elements(name, shape[0]) * np.float32(BIAS_SCALE)
    if plain_norms:
        return np.ones(shape[0], dtype=np.float32)
    return np.float32(1) + elements(name, shape[0]) * np.float32(BIAS_SCALE)


def divisors(name):
    return np.float32(2) + elements(name, PAIRS)


def unpermute(rows, heads):
    """Rows of queries or keys as they were trained, from rows whose neighbours rotate together."""
    return rows.reshape(heads, HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    # GPT-2.
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    # Experts.
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = 4
EXPERT_PARTS = {
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps",
    "down_proj": "ffn_down_exps",
    "up_proj": "ffn_up_exps",
}
WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def gguf_name(name, norms_after):
    stem, kind = name.rsplit(".", 1)
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    own = PARTS[part]
    if norms_after and part == "post_attention_layernorm":
        own = "post_attention_norm"
    return f"blk.{layer}.{own}.{kind}"


def common(**others):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": QUERY,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return sizes | others


def rope(base=10_000.0, **scaling):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base} | scaling}


def cases():
    t = transformers
    wide = {"hidden_size": NARROW, "head_dim": HEAD_DIM}
    gemma = wide | {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    longrope = {
        "long_factor": [float(v) for v in divisors("rope_factors_long.weight")],
        "short_factor": [float(v) for v in divisors("rope_factors_short.weight")],
        "original_max_position_embeddings": ORIGINAL,
        "partial_rotary_factor": 0.75,
    }
    return {
        "llama": t.LlamaConfig(**common(), **rope()),
        "llama3": t.LlamaConfig(
            **common(), **rope(rope_type="llama3", original_max_position_embeddings=64, **llama3)
        ),
        "linear": t.LlamaConfig(**common(), **rope(rope_type="linear", factor=4.0)),
        "mistral": t.MistralConfig(**common(sliding_window=WINDOW, head_dim=HEAD_DIM), **rope()),
        "qwen2": t.Qwen2Config(**common(), **rope()),
        "yarn": t.Qwen2Config(
            **common(), **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
        ),
        "qwen3": t.Qwen3Config(**common(**wide), **rope()),
        "smollm3": t.SmolLM3Config(**common(num_hidden_layers=4), **rope()),
        "olmo2": t.Olmo2Config(**common(), **rope()),
        "granite": t.GraniteConfig(
            **common(
                embedding_multiplier=6.0,
                residual_multiplier=0.25,
                attention_multiplier=0.125,
                logits_scaling=4.0,
            ),
            **rope(),
        ),
        "phi3": t.Phi3Config(
            **common(sliding_window=WINDOW, original_max_position_embeddings=ORIGINAL),
            **rope(rope_type="longrope", **longrope),
        ),
        "gemma2": t.Gemma2Config(
            **common(attn_logit_softcapping=4.0, final_logit_softcapping=6.0, **gemma), **rope()
        ),
        "gemma3": t.Gemma3TextConfig(
            **common(num_hidden_layers=6, **gemma),
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        "mixtral": t.MixtralConfig(
            **common(num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None), **rope()
        ),
        "qwen3_moe": t.Qwen3MoeConfig(
            **common(
                num_experts=EXPERTS,
                num_experts_per_tok=2,
                moe_intermediate_size=HIDDEN,
                norm_topk_prob=True,
                **wide,
            ),
            **rope(),
        ),
        "gpt2": t.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=QUERY,
            n_layer=2,
            n_head=HEADS,
            n_inner=HIDDEN,
            bos_token_id=1,
            eos_token_id=2,
        ),
    }


INTERLEAVED = ["llama", "llama3", "linear", "mistral", "mixtral", "smollm3", "granite"]
PLAIN_NORMS = ["llama", "llama3", "linear", "mistral", "qwen2", "yarn"]


def fill(name, model):
    """Gives every parameter its seeded values; returns where each comes from."""
    origins = {}
    norms_after = name in ["olmo2", "gemma2", "gemma3"]
    with torch.no_grad():
        for parameter, target in model.named_parameters():
            if ".experts." in parameter:
                target.copy_(torch.from_numpy(experts(parameter, target.shape)))
                continue
            own, shape, how = gguf_name(parameter, norms_after), list(target.shape), "same"
            if name == "gpt2" and len(shape) == 2 and "blk." in own:
                stored, how = values(own, shape[::-1], False).T, "transposed"
            else:
                stored = values(own, shape, name in PLAIN_NORMS)
            part = own.split(".")[-2]
            if name in INTERLEAVED and part in ["attn_q", "attn_k"]:
                stored, how = unpermute(stored, HEADS if part == "attn_q" else KV_HEADS), "unpermuted"
            if name.startswith("gemma") and "norm" in own:
                stored, how = stored - np.float32(1), "less one"
            target.copy_(torch.from_numpy(np.ascontiguousarray(stored)))
            origins[parameter] = [own, how]
    return origins


def experts(parameter, shape):
    """The matrices of all experts, gate and up projections joined."""
    layer = parameter.split(".")[2]
    count, rows, cols = shape
    if parameter.endswith("down_proj"):
        return matrix(f"blk.{layer}.ffn_down_exps.weight", count * rows, cols).reshape(shape)
    halves = [
        matrix(f"blk.{layer}.ffn_{part}_exps.weight", count * rows // 2, cols).reshape(count, rows // 2, cols)
        for part in ["gate", "up"]
    ]
    return np.concatenate(halves, axis=1)


def origin(key, origins):
    """Where a tensor of the checkpoint comes from; those of experts are written one by one."""
    if ".experts." not in key:
        # Some versions of a family call the part by another name in the file than in the model.
        return origins[key.replace("block_sparse_moe.", "mlp.")]
    before, after = key.split(".experts.")
    index, part, _ = after.split(".")
    return [f"blk.{before.split('.')[2]}.{EXPERT_PARTS[part]}.weight", f"expert {index}"]


def logits(model, ids, positions):
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].float().numpy()
    return [[float(f"{v:.6g}") for v in rows[position]] for position in positions]


def case(name, config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    origins = fill(name, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = json.loads(pathlib.Path(folder, "config.json").read_text())
        with safe_open(pathlib.Path(folder, "model.safetensors"), "pt") as file:
            names = {key: origin(key, origins) for key in sorted(file.keys())}
    ids = [(i * 37 + 11) % VOCABULARY for i in range(max(POSITIONS) + 1)]
    short = ids[: ORIGINAL - 4]
    return {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
        "config": stored,
        "tensors": names,
        "ids": ids,
        "positions": POSITIONS,
        "logits": logits(model, ids, POSITIONS),
        "short": logits(model, short, [len(short) - 1])[0] if name == "phi3" else [],
    }


def scaled_rotations():
    """Frequencies and magnitudes of the scalings of rotary positions."""
    made = {}
    for name, scaling in {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    }.items():
        config = transformers.LlamaConfig(**common(hidden_size=32 * HEADS), **rope(**scaling))
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        frequencies, magnitude = init(config, "cpu")
        made[name] = {"frequencies": [float(v) for v in frequencies], "magnitude": float(magnitude)}
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the cases")
    parser.add_argument("--rotations", type=pathlib.Path, required=True, help="file of scaled rotations")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, config in cases().items():
        text = json.dumps(case(name, config), separators=(",", ":"))
        (arguments.out / f"{name}.json").write_text(text + "\n")
        print(name, len(text))
    arguments.rotations.write_text(json.dumps(scaled_rotations(), indent=1) + "\n")


if __name__ == "__main__":
    main()
