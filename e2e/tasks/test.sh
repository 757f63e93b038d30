#!/usr/bin/env bash
# test.sh [long]: all stages, from format to scenarios on a real two-node Kubernetes; with `long` only what
# the scenarios of minutes need, and those: faults under load, autoscaling, verdicts. Prints the time of each,
# and takes the cluster down in any case; after a failure it first keeps the state of the cluster.
# KUBECONFIG is ignored: only our own cluster is ever used here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
source "$E2E_DIR/tasks/stages.sh"
unset KUBECONFIG
long=${1:-}
[ -z "$long" ] || [ "$long" = long ] || fail "unknown argument $long" "usage: test.sh [long]"
export TRUSTFORMERS_REQUIRE_MODELS=1 TRUSTFORMERS_TESTED_PROGRAMS=1

finish() {
  local status=$?
  trap - EXIT INT TERM
  [ -z "${BINARIES_AHEAD:-}" ] || kill -- "-$BINARIES_AHEAD" 2>/dev/null || true
  if [ -e "$STATE" ]; then
    [ $status = 0 ] || "$E2E_DIR/tasks/dump.sh" "$REPORT_DIR/failure" || true
    "$CLUSTER_SRC/down.sh" || status=1
  fi
  end_stages
  count_tests $status
  exit $status
}

preflight() { "$CLUSTER_SRC/preflight.sh" cluster && echo "this machine is ready"; }

# With --workspace in every call the same features are chosen for dependencies, so none is compiled twice.
# The plain manifests are compared with what helm renders, so helm is required.
unit() {
  local helm
  helm=$("$CLUSTER_SRC/binaries.sh" path helm)
  PATH=$(dirname "$helm"):$PATH TRUSTFORMERS_REQUIRE_HELM=1 cargo test --locked --profile ci --workspace
}

# What the cluster of the scenarios starts. Only autoscaling needs the metrics server.
binaries() {
  local names name unused='kwok|grpcurl'
  [ -n "$long" ] || unused+='|metrics-server'
  mapfile -t names < <(awk '!/^#/ { print $1 }' "$CLUSTER_SRC/binaries.txt" | grep -vxE "$unused")
  for name in "${names[@]}"; do "$CLUSTER_SRC/binaries.sh" path "$name"; done
}

# A cold run builds them in the processor time that the earlier stages leave over: downloads, links and tests
# of one thread. Its own process group, so that all of it ends with this run.
binaries_ahead() {
  [ -z "$(find "$BIN_STORE" -name kube-apiserver 2>/dev/null)" ] || return 0
  set -m
  (chrt --idle --pid 0 "$BASHPID" && binaries) >"$STAGE_LOGS/binaries-ahead.txt" 2>&1 &
  BINARIES_AHEAD=$!
  set +m
}

# A cluster that is up already may hold anything, so the scenarios get a fresh one.
cluster() {
  "$CLUSTER_SRC/down.sh"
  "$CLUSTER_SRC/up.sh" --nodes 2 --with "${long:+metrics-server}"
  "$CLUSTER_SRC/binaries.sh" link "$BIN" helm
  "$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE"/trustformers-{operator,gateway,runtime}.tar "$IMAGE_STORE"/{smollm2,minilm,qwen-0.5b,classifier,adapter}.tar
}

scenarios() {
  local chosen=(--skip long_)
  [ -z "$long" ] || chosen=(long_)
  TRUSTFORMERS_E2E_KUBECONFIG=$OUR_KUBECONFIG TRUSTFORMERS_E2E_BIN=$BIN TRUSTFORMERS_E2E_IMAGE_TAG=$(cat "$IMAGE_STORE/tag") \
    "$CLUSTER_SRC/client.sh" cargo test --locked --profile ci --workspace --test scenarios -- --test-threads=1 "${chosen[@]}"
}

cd "$REPO_DIR"
begin_stages
rm -rf "$REPORT_DIR/failure"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
stage preflight preflight
binaries_ahead
stage models "$E2E_DIR/models/fetch.sh" smollm2 minilm qwen-0.5b classifier adapter
if [ -z "$long" ]; then
  stage lint "$E2E_DIR/tasks/lint.sh"
  stage unit unit
  stage fuzz "$E2E_DIR/tasks/fuzz.sh" 20
  stage engine "$E2E_DIR/tasks/test-engine.sh" short
  stage clients "$E2E_DIR/tasks/test-clients.sh" short
fi
stage images "$E2E_DIR/images/build.sh"
stage binaries binaries
stage cluster cluster
stage scenarios scenarios
stage down "$CLUSTER_SRC/down.sh"
