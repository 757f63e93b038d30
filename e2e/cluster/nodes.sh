# Starting a node: containerd, kubelet and kube-proxy in their own network and mount namespace. Sourced.

NODE_BINARIES=(containerd containerd-shim-runc-v2 ctr runc bridge loopback host-local portmap kubelet kube-proxy)

# in_node NUMBER COMMAND...: runs a command as the node's own daemons run.
in_node() {
  local pid
  read -r pid _ <"$STATE/run/space$1.pid"
  shift
  # ctr would repeat at every call that cgroup v1 is going away.
  nsenter --target "$pid" --net --mount env CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 "$@"
}

# start_in_node NUMBER NAME COMMAND...
start_in_node() {
  local pid i=$1 name=$2
  shift 2
  read -r pid _ <"$STATE/run/space$i.pid"
  start "$name$i" nsenter --target "$pid" --net --mount env PATH="$BIN:$PATH" "$@"
}

node_config() { # NUMBER: fills the templates of config/ for this node
  local i=$1 folder template
  folder=$(node_dir "$i")
  mkdir -p "$folder/cni"
  for template in containerd.toml kubelet.yaml kube-proxy.yaml; do
    render "$i" "$CLUSTER_SRC/config/$template" >"$folder/$template"
  done
  render "$i" "$CLUSTER_SRC/config/pods.conflist" >"$folder/cni/10-pods.conflist"
  # The node has no resolver of its own: names outside the cluster do not exist here.
  echo "nameserver 127.0.0.1" >"$folder/resolv.conf"
}

render() {
  sed -e "s#@NODE@#$1#g" -e "s#@FOLDER@#$(node_dir "$1")#g" -e "s#@BIN@#$BIN#g" -e "s#@PKI@#$PKI#g" \
    -e "s#@CGROUP@#/$CGROUP/$(node_name "$1")#g" -e "s#@DNS@#$DNS_IP#g" -e "s#@POD_CIDR@#$POD_CIDR#g" \
    -e "s#@NOFILE@#$(ulimit -Hn | sed 's/unlimited/1048576/')#g" "$2"
}

# The container runtime needs no API server, so it is started first, while that one comes up.
start_runtime() { # NUMBER
  local i=$1
  node_certs "$i"
  node_config "$i"
  make_cgroup "$(node_name "$i")"
  alive "space$i" || rm -f "$(node_dir "$i")/ready"
  start "space$i" nsenter --net="/run/netns/$(node_netns "$i")" unshare --mount --propagation slave "$CLUSTER_SRC/node-space.sh" "$(node_dir "$i")"
  wait_until 10 "the mount namespace of node $i" test -f "$(node_dir "$i")/ready"
  start_in_node "$i" containerd "$BIN/containerd" --config "$(node_dir "$i")/containerd.toml"
}

start_kubelet() { # NUMBER
  local i=$1
  wait_until 20 "containerd of node $i" in_node "$i" "$BIN/ctr" version
  load_tar "$i" "$STATE/images/pause.tar"
  start_in_node "$i" kubelet "$BIN/kubelet" --config="$(node_dir "$i")/kubelet.yaml" --kubeconfig="$PKI/kubelet$i.kubeconfig" \
    --hostname-override="$(node_name "$i")" --node-ip="$(node_ip "$i")" --v=2
  start_in_node "$i" kube-proxy "$BIN/kube-proxy" --config="$(node_dir "$i")/kube-proxy.yaml" --hostname-override="$(node_name "$i")"
}

node_ready() { kc get node "$(node_name "$1")" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' 2>/dev/null | grep -x True >/dev/null; }

# load_tar NUMBER TAR: imports an image archive unless the node has that very image under that name. `pack.py`
# writes the name and digest beside the archive.
load_tar() {
  local i=$1 tar=$2 name digest
  read -r name digest <"$tar.id"
  if in_node "$i" "$BIN/ctr" -n k8s.io images ls "name==$name" | awk -v d="$digest" '$3 == d { found = 1 } END { exit !found }'; then return 0; fi
  in_node "$i" "$BIN/ctr" -n k8s.io images import --local --digests=false "$tar" >/dev/null
  say "loaded $name into $(node_name "$i")"
}
