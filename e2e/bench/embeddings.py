"""Embeddings of other engines: MiniLM on fixed ids (forward, mean over the sequence, length 1), texts a
second.

Runs inside the peers' environment and prints one JSON object: {engine: {batch: texts per second}}.
`--quantise FOLDER` makes OpenVINO's eight-bit model of the ONNX file in the folder instead. The figures
have no tokenizer in them, as ours beside them have none.
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


def inputs_of(ids):
    """All inputs that an export of the model may have."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def embed(ids):
        given = {name: value for name, value in inputs_of(ids).items() if name in names}
        states = session.run(None, given)[0]
        mean = states.mean(1) if states.ndim == 3 else states
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    return embed


def openvino(path):
    """OpenVINO with its own choice of types: bf16 where the processor multiplies it, else f32."""
    import openvino

    core = openvino.Core()
    compiled = {}

    def embed(ids):
        # A model of fixed shape is faster than one for any.
        if ids.shape not in compiled:
            model = core.read_model(path)
            model.reshape({value.any_name: list(ids.shape) for value in model.inputs})
            settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
            compiled[ids.shape] = core.compile_model(model, "CPU", settings)
        model = compiled[ids.shape]
        names = {value.any_name for value in model.inputs}
        states = model({name: value for name, value in inputs_of(ids).items() if name in names})[0]
        mean = states.mean(1) if states.ndim == 3 else states
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    return embed


def quantise_for_openvino(folder):
    """Eight-bit weights and activations by NNCF, calibrated on texts of other ids than the measured ones."""
    import nncf
    import openvino

    model = openvino.Core().read_model(f"{folder}/model.onnx")
    names = {value.any_name for value in model.inputs}
    numbers = np.random.default_rng(7)
    texts = [numbers.integers(1000, 29000, (1, TOKENS), dtype=np.int64) for _ in range(32)]
    given = [{name: value for name, value in inputs_of(ids).items() if name in names} for ids in texts]
    quantised = nncf.quantize(
        model, nncf.Dataset(given), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(given)
    )
    openvino.save_model(quantised, f"{folder}/int8-openvino.xml")


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
    if sys.argv[1] == "--quantise":
        quantise_for_openvino(sys.argv[2])
        return
    model, onnx_folder = sys.argv[1:]
    engines = {
        "onnxruntime-f32": onnx(f"{onnx_folder}/model.onnx"),
        "onnxruntime-int8": onnx(f"{onnx_folder}/int8.onnx"),
        "openvino": openvino(f"{onnx_folder}/model.onnx"),
        "openvino-int8": openvino(f"{onnx_folder}/int8-openvino.xml"),
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
