#!/usr/bin/env bash
# lint.sh [PART...]: format, lints, licences and sources of dependencies, shell, Python, the chart and the
# manifests, and the repository's own rules (tidy). Without a name: every part. Parts: rust features
# licences shell python manifests tidy.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
cd "$REPO_DIR"

tool() { "$E2E_DIR/tasks/tool.sh" "$@"; }
binary() { "$CLUSTER_SRC/binaries.sh" path "$1"; }

lint_rust() {
  cargo fmt --all --check
  cargo clippy --locked --profile ci --workspace --all-targets -- -D warnings
}

# Programs have no test clock, and no crate is taken with all its features.
lint_features() {
  local tree
  tree=$(cargo tree --locked --workspace --edges features,normal,build --prefix none)
  ! grep -E '^tokio feature "test-util"' <<<"$tree" || fail "programs would have tokio's test-util" "it belongs into dev-dependencies"
  ! grep -E '= \{.*features = \[.*"full"' Cargo.toml | grep -v '^syn ' || fail "name the features that are used" "see Cargo.toml"
}

lint_licences() { tool cargo-deny check --hide-inclusion-graph licenses bans sources; }

# Scripts are checked one by one and sourced files are not followed: what env.sh sets for others would look
# unused there (SC2034), and unset in the others (SC2154).
lint_shell() {
  local scripts sourced
  mapfile -t scripts < <(git ls-files '*.sh' .ci/run | xargs grep -L '^# .*Sourced')
  mapfile -t sourced < <(git ls-files '*.sh' | xargs grep -l '^# .*Sourced')
  tool shellcheck --shell=bash --exclude=SC1090,SC1091,SC2154 "${scripts[@]}"
  tool shellcheck --shell=bash --exclude=SC1090,SC1091,SC2154,SC2034 "${sourced[@]}"
}

lint_python() {
  tool ruff format --quiet --check "$E2E_DIR"
  tool ruff check --quiet "$E2E_DIR"
  tool ruff format --quiet --check --config "$E2E_DIR/ruff.toml" examples
  tool ruff check --quiet --config "$E2E_DIR/ruff.toml" examples
}

# The schemas are those of the Kubernetes that the tests run on, and of our own definitions: no field that
# they do not name passes. Stages are KWOK's, which the benchmark of the operator alone applies.
lint_manifests() {
  local schemas swagger
  schemas=$(mktemp -d)
  swagger=$("$CLUSTER_SRC/binaries.sh" source kubernetes k8s.io/kubernetes)/api/openapi-spec/swagger.json
  "$(binary schemas)" "$schemas" "$swagger" k8s/10-inferencemodels.yaml k8s/11-abtests.yaml
  "$(binary helm)" lint --quiet --strict charts/trustformers
  {
    "$(binary helm)" template trustformers charts/trustformers
    for file in k8s/*.yaml examples/*.yaml "$CLUSTER_SRC"/manifests/*.yaml; do echo ---; cat "$file"; done
  } | "$(binary kubeconform)" -strict -skip Stage -schema-location "$schemas/{{.ResourceKind}}{{.KindSuffix}}.json"
  rm -r "$schemas"
}

lint_tidy() { cargo test --locked --profile ci --workspace --test repository; }

[ $# -gt 0 ] || set -- shell python features licences manifests rust tidy
for part in "$@"; do
  declare -F "lint_$part" >/dev/null || fail "there is no part $part" "parts: rust features licences shell python manifests tidy"
  "lint_$part"
done
