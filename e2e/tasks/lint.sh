#!/usr/bin/env bash
# lint.sh: format, lints, licences and sources of dependencies, and the repository's own rules (tidy).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cargo fmt --all --check
cargo clippy --locked --profile ci --workspace --all-targets -- -D warnings
e2e/tasks/cargo-deny.sh check --hide-inclusion-graph licenses bans sources
cargo test --locked --profile ci --workspace --test repository
