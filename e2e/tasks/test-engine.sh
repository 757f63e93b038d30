#!/usr/bin/env bash
# test-engine.sh: the engine's objectives on SmolLM2: memory through a mixed run, classes, fairness between
# tenants, quality of fast numerics. Prints `name value need ok|MISS` and fails where one is missed. Builds
# what `cargo test
# --workspace` builds, so nothing is compiled twice.
#   test-engine.sh          a quarter of an hour; times are judged, so nothing else should run
#   test-engine.sh short    about a minute; only what is the same on every machine is judged
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
"$E2E_DIR/models/fetch.sh" smollm2
cargo build --locked --profile ci --workspace --example objectives
TRUSTFORMERS_MODELS=$MODEL_STORE exec "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/examples/objectives" "$@"
