#!/usr/bin/env bash
# soak.sh [SECONDS]: our gateway at saturation on one core, ten minutes beside hostile callers: slow heads,
# 2,048 stalled streams, 64 stalled uploads, slow readers, names that are made up, callers that leave while
# they are held. Prints a table, and fails where others are slower than 1.5 times, memory is not flat or above
# the bound that the gateway prints, or something is left when the callers have gone. Latencies are compared,
# so nothing else should run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
GATEWAY_SOAK_SECONDS=${1:-600}
[[ $GATEWAY_SOAK_SECONDS =~ ^[0-9]+$ ]] || fail "$GATEWAY_SOAK_SECONDS is not a number of seconds" "usage: soak.sh [SECONDS]"
export GATEWAY_SOAK_SECONDS
source "$E2E_DIR/bench/proxies.sh"
trap end_left EXIT
build_gateway
# Three more windows of a twentieth without hostile callers, and the time in which connections end.
run_peers $((GATEWAY_SOAK_SECONDS * 13 / 10 + 300))
