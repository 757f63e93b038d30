#!/usr/bin/env bash
# demo.sh: from nothing to tokens. Builds a Kubernetes and our images, starts both on this machine, installs
# the chart, applies a four-line InferenceModel and sends it a prompt. Can be repeated; demo-down.sh removes
# everything.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
if [ -n "${KUBECONFIG:-}" ] && [ "$KUBECONFIG" != "$OUR_KUBECONFIG" ]; then exec "$E2E_DIR/tasks/demo-elsewhere.sh"; fi
export KUBECONFIG=$OUR_KUBECONFIG PATH="$BIN:$PATH"
source "$E2E_DIR/tasks/timing.sh"
source "$E2E_DIR/tasks/install.sh"

binaries() {
  local names name
  # Neither fake nodes nor metrics are needed here.
  mapfile -t names < <(awk '!/^#/ { print $1 }' "$CLUSTER_SRC/binaries.txt" | grep -vxE 'kwok|metrics-server|kubeconform|schemas|grpcurl')
  for name in "${names[@]}"; do "$CLUSTER_SRC/binaries.sh" path "$name" >/dev/null; done
}

start_cluster() {
  "$CLUSTER_SRC/up.sh" --nodes 1 >/dev/null
  "$CLUSTER_SRC/binaries.sh" link "$BIN" helm
}

load() { "$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE"/trustformers-{operator,gateway,runtime}.tar "$IMAGE_STORE/smollm2.tar"; }

install() { install_chart --set-string "image.tag=$(cat "$IMAGE_STORE/tag")" --set gateway.service.type=NodePort; }

apply_and_await() {
  local began_ms=$(($(date +%s%N) / 1000000))
  apply_model oci://localhost/smollm2-135m-instruct:q4_1
  await_model
  READY_MS=$(($(date +%s%N) / 1000000 - began_ms))
}

send_prompt() { python3 "$E2E_DIR/tasks/prompt.py" "$ADDRESS" "$DEMO_MODEL" "The capital of France is"; }

step "this machine" "$CLUSTER_SRC/preflight.sh" cluster
step "the cluster's binaries (once: about 15 minutes)" binaries
step "our programs and images" "$E2E_DIR/images/build.sh"
step "the model" "$E2E_DIR/models/fetch.sh"
step "a cluster of one node" start_cluster
step "images into the node" load
step "helm install trustformers ./charts/trustformers" install
step "kubectl apply -f examples/smollm2.yaml, until ready" apply_and_await
port=$(kubectl -n "$SYSTEM_NAMESPACE" get service trustformers-gateway -o 'jsonpath={.spec.ports[?(@.name=="http")].nodePort}')
ADDRESS=http://$(node_ip 1):$port
kubectl -n "$DEMO_NAMESPACE" get imodel "$DEMO_MODEL"
step "a request through the gateway" send_prompt
mkdir -p "$REPORT_DIR"
printf '{"time": "%s", "apply_to_ready_ms": %d, "total_seconds": %d}\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$READY_MS" $SECONDS >"$REPORT_DIR/demo.json"
echo
print_steps
curl_line "$ADDRESS"
echo "
Look around:  make kubectl ARGS='get imodel -A'
End it:       make demo-down"
