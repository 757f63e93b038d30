#!/usr/bin/env bash
# client.sh COMMAND...: runs a client of the cluster so that `down` ends it and its children, should they
# still run. Without the cluster's network, a client that retries would send its packets out of the machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$CLUSTER_SRC/process.sh"
group=$(tracking_root)/clients
[ -d "$group" ] || fail "there is no cluster" "make cluster-up"
echo $$ >"$group/cgroup.procs"
exec "$@"
