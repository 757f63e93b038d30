#!/usr/bin/env bash
# up.sh [--nodes N] [--with "metrics-server kwok=20 gpu=2"]
#
# Starts Kubernetes on this machine, or adds missing nodes and additions to a running cluster; it removes
# nothing from one. A broken cluster (a daemon died, the machine was rebooted, an earlier run was interrupted)
# is removed and started again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
for part in process cgroups lan certs sysctls leftovers control nodes system-images addons; do source "$CLUSTER_SRC/$part.sh"; done

nodes=1 additions=
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes=$2; shift 2 ;;
    --with) additions=$2; shift 2 ;;
    *) fail "unknown argument $1" "usage: up.sh [--nodes N] [--with \"metrics-server kwok[=N] gpu[=N]\"]" ;;
  esac
done
[[ $nodes =~ ^[1-$MAX_NODES]$ ]] || fail "NODES=$nodes: expected 1 to $MAX_NODES"

healthy() { cluster_runs && apiserver_ready >/dev/null 2>&1; }

begin_state() {
  mkdir -p "$STATE"
  chmod 711 "$STATE"
  cat /proc/sys/kernel/random/boot_id >"$STATE/boot"
  save_sysctls
  "$CLUSTER_SRC/binaries.sh" link "$BIN" "${CONTROL_BINARIES[@]}" "${NODE_BINARIES[@]}" coredns
  pack_pause
}

add_nodes() { # FROM TO
  local i
  lan_up "$2"
  for i in $(seq "$1" "$2"); do start_runtime "$i"; done
  wait_until 60 "a ready API server" apiserver_ready
  for i in $(seq "$1" "$2"); do start_kubelet "$i"; done
  echo "$2" >"$STATE/nodes"
  for i in $(seq "$1" "$2"); do wait_until 60 "$(node_name "$i") ready" node_ready "$i"; done
}

take_lock
"$CLUSTER_SRC/preflight.sh" cluster
if [ -e "$STATE" ] || ! count_leftovers >/dev/null; then
  healthy || { say "removing what is left of an earlier cluster"; "$CLUSTER_SRC/down.sh"; }
fi

running=$(nodes_up)
if [ "$running" = 0 ]; then
  begin_state
  began=$SECONDS
  lan_up "$nodes"
  control_certs
  start_apiserver
  # Containers' runtimes come up while the API server does.
  for i in $(seq "$nodes"); do start_runtime "$i"; done
  wait_until 60 "a ready API server" apiserver_ready
  say "the API server is ready"
  start_controllers
  add_nodes 1 "$nodes"
  add_dns
  wait_until 60 "cluster DNS" available kube-system coredns
  touch "$STATE/complete"
  say "$nodes node(s) and DNS are ready, $((SECONDS - began)) s after the binaries were there"
elif [ "$running" -lt "$nodes" ]; then
  add_nodes $((running + 1)) "$nodes"
  for tar in "$STATE"/images/*.tar; do load_everywhere "$tar"; done
  say "the cluster has $nodes nodes now"
elif [ "$running" -gt "$nodes" ]; then
  say "the cluster is up with $running nodes, which is more than $nodes: left as it is (make cluster-down to start over)"
else
  say "the cluster is up with $running node(s)"
fi
for addition in $additions; do add_addon "$addition"; done
echo "export KUBECONFIG=$OUR_KUBECONFIG"
