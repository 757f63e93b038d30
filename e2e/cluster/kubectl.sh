#!/usr/bin/env bash
# kubectl.sh ARGUMENT...: kubectl on our own cluster, or on the one that KUBECONFIG names (whose context is
# printed first).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ -n "${KUBECONFIG:-}" ] && [ "$KUBECONFIG" != "$OUR_KUBECONFIG" ]; then
  kubectl=$(command -v kubectl || "$CLUSTER_SRC/binaries.sh" path kubectl)
  echo "context: $("$kubectl" config current-context) (KUBECONFIG=$KUBECONFIG)" >&2
  exec "$kubectl" "$@"
fi
[ -f "$OUR_KUBECONFIG" ] || fail "there is no cluster" "make cluster-up"
unset KUBECONFIG
exec "$CLUSTER_SRC/client.sh" "$BIN/kubectl" --kubeconfig "$OUR_KUBECONFIG" "$@"
