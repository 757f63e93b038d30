#!/usr/bin/env bash
# pod.sh: figures of one pod, each beside its objective: start to ready and first token with SmolLM2 from cold
# and warm files, swaps between two versions under streams, and fetching beside loopback, disk and sha256 at
# once. All steps are run; fails where an objective is missed. Times are judged, so nothing else should run.
# POD_BENCH_SWAPS=100 POD_BENCH_RELOADS=20 POD_BENCH_STREAMS=32 POD_BENCH_MIB=1024; TRUSTFORMERS_BUILT=1:
# the programs are there already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
programs=${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci
[ -n "${TRUSTFORMERS_BUILT:-}" ] ||
  cargo build --locked --profile ci --workspace --bin trustformers-runtime --example swaps --example throughput
"$E2E_DIR/models/fetch.sh" smollm2

missed=()
# step NAME COMMAND...: runs a step; what it misses is told at the end.
step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || missed+=("$name")
}

step start python3 "$E2E_DIR/bench/start.py" "$programs/trustformers-runtime" "$MODEL_STORE/SmolLM2-135M-Instruct.Q4_1.gguf"
step swaps "$programs/examples/swaps" --streams "${POD_BENCH_STREAMS:-32}" --swaps "${POD_BENCH_SWAPS:-100}"
# Every swap also loads the next version and unloads the one before: memory must come back from that, too.
step reloads "$programs/examples/swaps" --streams "${POD_BENCH_STREAMS:-32}" --swaps "${POD_BENCH_RELOADS:-20}" --reload
# The cache's own volume: a folder of the system for temporary files is often memory.
mkdir -p "$CACHE"
step fetching "$programs/examples/throughput" "${POD_BENCH_MIB:-1024}" "$CACHE"
[ ${#missed[@]} = 0 ] || fail "objectives are missed: ${missed[*]}"
