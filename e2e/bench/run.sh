#!/usr/bin/env bash
# run.sh: ours and other engines on this processor, in turns and in one run, on 2 threads; prints the table of ratios.
# Gets models and peers first (about 8 GB and half an hour on two cores, kept in the cache). A bar that is missed is
# printed as MISS; only what could not be run is a failure.
#   BENCH_ROUNDS=5      turns that each measurement takes, at least 3
#   BENCH_ONLY=minilm   only the groups of rows whose names begin so
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
models=(smollm2 minilm qwen-0.5b qwen-1.5b)
"$E2E_DIR/models/fetch.sh" "${models[@]}"
llama=$("$E2E_DIR/bench/llama-cpp.sh")
mapfile -t python < <("$E2E_DIR/bench/python.sh")
[ "${#python[@]}" = 2 ] || fail "the Python peers could not be made" "see above"
say "building ours ..."
cargo build --locked --profile ci -p trustformers-serve --bin trustformers-serve
cargo build --locked --profile ci -p trustformers-cpu --examples
mkdir -p "$REPORT_DIR"
exec python3 "$E2E_DIR/bench/bars.py" --ours "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci" --llama "$llama" \
  --python "${python[0]}" --onnx "${python[1]}" --models "$MODEL_STORE" --report "$REPORT_DIR/bench-cpu.json" \
  --rounds "${BENCH_ROUNDS:-3}" --only "${BENCH_ONLY:-}"
