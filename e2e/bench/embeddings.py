"""Embeddings of other engines: MiniLM on fixed ids (forward, mean over the sequence, length 1), texts a
second.

Runs inside the peers' environment and prints one JSON object: {engine: {batch: texts per second}}. The
figures have no tokenizer in them, as ours beside them have none.
"""

import json
import sys
import time

import numpy as np

TOKENS = 128
BATCHES = (1, 32)
THREADS = 2
# Long enough for several calls at batch 32.
SECONDS = 1.5


def onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def embed(ids):
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        states = session.run(None, {name: value for name, value in given.items() if name in names})[0]
        mean = states.mean(1) if states.ndim == 3 else states
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    return embed


def torch_bf16(folder):
    import torch
    from transformers import BertModel

    torch.set_num_threads(THREADS)
    model = BertModel.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def embed(ids):
        with torch.inference_mode():
            ids = torch.from_numpy(ids)
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return torch.nn.functional.normalize(states.float().mean(1), dim=1).numpy()

    return embed


def ids(batch):
    return (1000 + np.arange(batch * TOKENS) * 7919 % 20000).reshape(batch, TOKENS).astype(np.int64)


def speed(embed, batch):
    tokens = ids(batch)
    embed(tokens)
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        embed(tokens)
        calls += 1
    return calls * batch / (time.perf_counter() - began)


def main():
    model, onnx_folder = sys.argv[1:]
    engines = {
        "onnxruntime-f32": onnx(f"{onnx_folder}/model.onnx"),
        "onnxruntime-int8": onnx(f"{onnx_folder}/int8.onnx"),
        "torch-bf16": torch_bf16(model),
    }
    # A peer that computes something else would be no peer.
    reference = engines["onnxruntime-f32"](ids(1))[0]
    for name, embed in engines.items():
        cosine = float(np.dot(embed(ids(1))[0], reference))
        if cosine < 0.98:
            sys.exit(f"{name} gives another embedding than onnxruntime-f32: cosine {cosine:.4f}")
    print(
        json.dumps(
            {name: {str(batch): speed(embed, batch) for batch in BATCHES} for name, embed in engines.items()}
        )
    )


if __name__ == "__main__":
    main()
