#!/usr/bin/env bash
# test-overload.sh: four times as many requests as a server can answer, for a minute [SECONDS]. Every one is
# answered or refused with the time of the next attempt, memory stays flat, and admitted requests are hardly
# slower than at saturation. Times are judged, so nothing else should run. Builds what
# `cargo test --workspace` builds.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
cargo build --locked --profile ci --workspace --example overload
exec "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/examples/overload" "$@"
