# Additions to the cluster: CoreDNS (always), metrics-server, KWOK's fake nodes, simulated GPUs. Sourced.

# available NAMESPACE DEPLOYMENT: true when all its replicas are.
available() { kc -n "$1" get deployment "$2" -o 'jsonpath={.status.conditions[?(@.type=="Available")].status}' 2>/dev/null | grep -x True >/dev/null; }

add_dns() {
  pack_tool coredns
  load_everywhere "$STATE/images/coredns.tar"
  kc apply --server-side -f "$CLUSTER_SRC/manifests/coredns.yaml" >/dev/null
}

metrics_api_answers() { kc get --raw /apis/metrics.k8s.io/v1beta1/nodes | grep '"usage"' >/dev/null; }

add_metrics_server() {
  "$CLUSTER_SRC/binaries.sh" link "$BIN" metrics-server
  pack_tool metrics-server
  load_everywhere "$STATE/images/metrics-server.tar"
  kc apply --server-side -f "$CLUSTER_SRC/manifests/metrics-server.yaml" >/dev/null
  wait_until 60 "an answer of the metrics API" metrics_api_answers
  say "metrics-server answers"
}

# KWOK has no built-in behaviour: its stages are given from its module, but for those of running pods.
add_kwok() { # COUNT
  local count=$1 stages i
  "$CLUSTER_SRC/binaries.sh" link "$BIN" kwok
  stages=$("$CLUSTER_SRC/binaries.sh" source kwok sigs.k8s.io/kwok)/kustomize/stage
  start_control kwok "$BIN/kwok" --kubeconfig "$PKI/admin.kubeconfig" --cidr 10.245.0.0/16 --node-lease-duration-seconds 40 \
    --manage-nodes-with-annotation-selector kwok.x-k8s.io/node=fake \
    --config "$stages/node/fast/node-initialize.yaml" --config "$stages/node/heartbeat-with-lease/node-heartbeat-with-lease.yaml" \
    --config "$CLUSTER_SRC/manifests/kwok-pods.yaml" --config "$stages/pod/fast/pod-complete.yaml" --config "$stages/pod/fast/pod-delete.yaml"
  for i in $(seq "$count"); do sed "s/@NUMBER@/$i/g" "$CLUSTER_SRC/manifests/kwok-node.yaml"; done | kc apply -f - >/dev/null
  wait_until 60 "$count fake nodes ready" kwok_nodes_ready "$count"
  say "$count fake nodes are ready (label type=kwok, taint kwok.x-k8s.io/node)"
}

kwok_nodes_ready() { [ "$(kc get nodes -l type=kwok --no-headers | awk '$2 == "Ready"' | wc -l)" -ge "$1" ]; }

# Extended resources that no device plugin reports survive kubelet's heartbeats: placing by GPUs can be tried
# without one.
add_gpus() { # COUNT per node
  local i
  for i in $(seq "$(nodes_up)"); do
    kc patch node "$(node_name "$i")" --subresource=status --type=json -p "[
      {\"op\": \"add\", \"path\": \"/status/capacity/nvidia.com~1gpu\", \"value\": \"$1\"},
      {\"op\": \"add\", \"path\": \"/status/allocatable/nvidia.com~1gpu\", \"value\": \"$1\"}]" >/dev/null
  done
  say "each node now counts $1 nvidia.com/gpu (simulated: there is no device)"
}

# add_addon SPEC: metrics-server | kwok[=NODES] | gpu[=PER_NODE]
add_addon() {
  case $1 in
    metrics-server) add_metrics_server ;;
    kwok) add_kwok 10 ;;
    kwok=*) add_kwok "${1#*=}" ;;
    gpu) add_gpus 2 ;;
    gpu=*) add_gpus "${1#*=}" ;;
    *) fail "unknown addition '$1'" "known: metrics-server, kwok[=NODES], gpu[=PER_NODE]" ;;
  esac
}
