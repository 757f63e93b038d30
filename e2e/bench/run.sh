#!/usr/bin/env bash
# run.sh: our runtime and other engines on this processor, alternately and in one run, on 2 threads; prints
# the table of ratios. Gets the models and peers that its groups need first (all: about 8 GB and an hour
# on two cores, kept in the cache). An objective that is missed is printed as MISS; only what could not be run
# is a failure.
#   BENCH_ROUNDS=5      turns that each measurement takes, at least 3
#   BENCH_ONLY=minilm   only the groups of rows whose names begin so; older: those beside an older version
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
asked=(--rounds "${BENCH_ROUNDS:-3}" --only "${BENCH_ONLY:-}")
# A wrong argument ends here, before anything is fetched or built. Only what the groups need is fetched.
needs=$(python3 "$E2E_DIR/bench/objectives.py" --needs "${asked[@]}")
needed() { awk -v kind="$1:" 'index($0, kind) == 1 { print substr($0, length(kind) + 1) }' <<<"$needs"; }
mapfile -t models < <(needed model)
mapfile -t peers < <(needed peer)

[ "${#models[@]}" = 0 ] || "$E2E_DIR/models/fetch.sh" "${models[@]}"
for peer in "${peers[@]}"; do
  case $peer in
    llama)
      llama=$("$E2E_DIR/bench/llama-cpp.sh")
      asked+=(--llama "$llama")
      ;;
    python)
      mapfile -t python < <("$E2E_DIR/bench/python.sh")
      [ "${#python[@]}" = 2 ] || fail "the Python peers could not be made" "see above"
      asked+=(--python "${python[0]}" --onnx "${python[1]}")
      ;;
    older)
      older=$("$E2E_DIR/bench/older.sh")
      asked+=(--older "$older")
      ;;
    *) fail "no script gets the peer $peer" "needs: $E2E_DIR/bench/objectives.py" ;;
  esac
done
say "building our programs ..."
cargo build --locked --profile ci --workspace --bins
cargo build --locked --profile ci -p trustformers-cpu --examples
mkdir -p "$REPORT_DIR"
exec python3 "$E2E_DIR/bench/objectives.py" --ours "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci" --models "$MODEL_STORE" \
  --report "$REPORT_DIR/bench-cpu.json" "${asked[@]}"
