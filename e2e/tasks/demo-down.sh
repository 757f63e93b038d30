#!/usr/bin/env bash
# demo-down.sh: removes the demo: the whole cluster if it is that of this machine, else what the demo made on
# the one that KUBECONFIG names.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
if [ -z "${KUBECONFIG:-}" ] || [ "$KUBECONFIG" = "$OUR_KUBECONFIG" ]; then exec "$CLUSTER_SRC/down.sh"; fi
source "$E2E_DIR/tasks/install.sh"
source "$E2E_DIR/tasks/forward.sh"

PATH=$PATH:$CACHE/tools
echo "context: $(kubectl config current-context) (KUBECONFIG=$KUBECONFIG)"
stop_forward
# Models first, while the operator runs and removes their children.
if is_demos "$DEMO_NAMESPACE"; then
  kubectl -n "$DEMO_NAMESPACE" delete imodel --all --ignore-not-found --timeout=120s
  kubectl delete namespace "$DEMO_NAMESPACE" --timeout=120s
fi
if is_demos "$SYSTEM_NAMESPACE"; then
  helm -n "$SYSTEM_NAMESPACE" uninstall trustformers --ignore-not-found --wait
  kubectl delete namespace "$SYSTEM_NAMESPACE" --timeout=120s
  echo "left: the resource definitions (other people's models may use them): kubectl get crd -o name | grep serving.trustformers.dev"
else
  echo "nothing of the demo is on this cluster"
fi
