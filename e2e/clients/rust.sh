#!/usr/bin/env bash
# rust.sh BASE_URL GRPC_ADDRESS MODEL EMBED_MODEL: the gRPC client in Rust of examples/course. A line PASS or
# FAIL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# With --workspace the same features are chosen as in the tests, so nothing is compiled twice.
# TRUSTFORMERS_BUILT=1: it is there already.
[ -n "${TRUSTFORMERS_BUILT:-}" ] || cargo build --quiet --locked --profile ci --workspace --example course-08-grpc >&2
if found=$(TRUSTFORMERS_GRPC=http://$2 TRUSTFORMERS_MODEL=$3 "${CARGO_TARGET_DIR:-target}/ci/examples/course-08-grpc" 2>&1) && [ -n "$found" ]; then
  echo "PASS rust: generate, by the client of examples/course"
else
  echo "FAIL rust: generate, by the client of examples/course: $(tr '\n' ' ' <<<"$found" | cut -c1-600)"
  exit 1
fi
