#!/usr/bin/env bash
# test-sources.sh [ARGUMENT...]: the program of a pod fetches SmolLM2 from servers of each kind: moto for S3,
# and one server of e2e/sources that is a hub, a signed S3, a registry with logins, and a web server that
# cuts, stalls and damages its answers. Prints a line for each, and fails where one is not as it must be.
# Builds the program; TRUSTFORMERS_BUILT=1: it is there already. ARGUMENT: as run.py takes them, such as
# --only s3.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

SOURCES=$E2E_DIR/sources

# moto_environment: prints the Python with moto. Only wheels: a source package would run a program of its own.
moto_environment() {
  local folder
  folder=$CACHE/sources-$({ cat "$SOURCES/python.txt"; python3 --version; } | sha256sum | cut -c1-12)
  if [ ! -f "$folder/complete" ]; then
    say "getting moto ..."
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --no-deps -r "$SOURCES/python.txt" >&2 ||
      fail "pip could not install moto" "pins: $SOURCES/python.txt"
    touch "$folder/complete"
  fi
  echo "$folder/bin/python"
}

cd "$REPO_DIR"
mkdir -p "$CACHE"
[ -n "${TRUSTFORMERS_BUILT:-}" ] || cargo build --locked --profile ci --workspace --bin trustformers-runtime
"$E2E_DIR/models/fetch.sh" smollm2
# The certificate that run.py makes for https.
command -v openssl >/dev/null || fail "openssl is not installed" "see preflight.sh"
exec 8>"$CACHE/sources.lock"
flock 8
moto=$(moto_environment)
exec 8>&-
exec python3 "$SOURCES/run.py" "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/trustformers-runtime" \
  "$MODEL_STORE/SmolLM2-135M-Instruct.Q4_1.gguf" --moto "$moto" "$@"
