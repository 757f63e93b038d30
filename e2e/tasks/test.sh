#!/usr/bin/env bash
# test.sh: all rungs, from format to stories on a real two-node Kubernetes. Prints what each took, and takes the cluster
# down in any case; after a failure it first keeps what the cluster knew. KUBECONFIG is ignored: only our own cluster is
# ever used here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
source "$E2E_DIR/tasks/rungs.sh"
unset KUBECONFIG
export TRUSTFORMERS_REQUIRE_MODELS=1

finish() {
  local status=$?
  trap - EXIT INT TERM
  if [ -e "$STATE" ]; then
    [ $status = 0 ] || "$E2E_DIR/tasks/dump.sh" "$REPORT_DIR/failure" || true
    "$CLUSTER_SRC/down.sh" || status=1
  fi
  end_rungs
  count_tests $status
  exit $status
}

preflight() { "$CLUSTER_SRC/preflight.sh" cluster && echo "this machine is ready"; }

# With --workspace in every call the same features are chosen for dependencies, so none is compiled twice.
# The plain manifests are compared with what helm renders, so that it has to be there.
unit() {
  local helm
  helm=$("$CLUSTER_SRC/binaries.sh" path helm)
  PATH=$(dirname "$helm"):$PATH TRUSTFORMERS_REQUIRE_HELM=1 cargo test --locked --profile ci --workspace
}

binaries() { local name; for name in $(awk '!/^#/ { print $1 }' "$CLUSTER_SRC/binaries.txt" | grep -vx kwok); do "$CLUSTER_SRC/binaries.sh" path "$name"; done; }

# A cluster that somebody still has up may hold anything, so the stories get a fresh one.
cluster() {
  "$CLUSTER_SRC/down.sh"
  "$CLUSTER_SRC/up.sh" --nodes 2 --with metrics-server
  "$CLUSTER_SRC/binaries.sh" link "$BIN" helm
  "$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE"/trustformers-{operator,gateway,runtime}.tar "$IMAGE_STORE"/{smollm2,minilm}.tar
}

stories() {
  TRUSTFORMERS_E2E_KUBECONFIG=$OUR_KUBECONFIG TRUSTFORMERS_E2E_BIN=$BIN TRUSTFORMERS_E2E_IMAGE_TAG=$(cat "$IMAGE_STORE/tag") \
    "$CLUSTER_SRC/client.sh" cargo test --locked --profile ci --workspace --test stories -- --test-threads=1
}

cd "$REPO_DIR"
begin_rungs
rm -rf "$REPORT_DIR/failure"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rung preflight preflight
rung models "$E2E_DIR/models/fetch.sh" smollm2 minilm qwen-0.5b
rung lint "$E2E_DIR/tasks/lint.sh"
rung unit unit
rung engine "$E2E_DIR/tasks/test-engine.sh" short
rung images "$E2E_DIR/images/build.sh"
rung binaries binaries
rung cluster cluster
rung stories stories
rung down "$CLUSTER_SRC/down.sh"
