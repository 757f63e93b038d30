# The network of the cluster. Sourced.
#
# A bridge in a namespace of its own (tf-lan) connects this machine (.1), the control plane (.2) and the nodes
# (.11 ...). Everything of the cluster runs in such namespaces: its rules, routes and bridges never touch the
# machine's own, and since the default route of each leads to an address that no host has, nothing can leave
# the machine.
# `nsenter` is used and not `ip netns exec`, because the latter remounts /sys and so hides the cgroups.

in_ns() { local ns=$1; shift; nsenter --net="/run/netns/$ns" "$@"; }

make_ns() {
  # A name whose mount is gone (a reboot, a crash half way) is a plain file: entering it fails, so it is made
  # again.
  if [ -e "/run/netns/$1" ] && ! in_ns "$1" true 2>/dev/null; then rm -f "/run/netns/$1"; fi
  [ -e "/run/netns/$1" ] || ip netns add "$1"
  in_ns "$1" ip link set lo up
}

# plug NAMESPACE ADDRESS PORT: a cable from the switch to a namespace. A half-made one is pulled out first.
plug() {
  local ns=$1 address=$2 port=$3
  in_ns "$ns" ip -o addr show dev lan0 2>/dev/null | grep "inet $address/" >/dev/null && in_ns "$NS_LAN" ip link show "$port" >/dev/null 2>&1 && return 0
  in_ns "$NS_LAN" ip link del "$port" 2>/dev/null || true
  ip link add "$port" netns "$NS_LAN" type veth peer name lan0 netns "$ns"
  in_ns "$NS_LAN" ip link set "$port" master br0 up
  in_ns "$ns" ip addr add "$address/24" dev lan0
  in_ns "$ns" ip link set lan0 up
  in_ns "$ns" ip route replace default via "$NOWHERE_IP" dev lan0 onlink
  in_ns "$ns" sysctl -qw net.ipv4.ip_forward=1
  # Without this a pod's answer to another pod on the same bridge would miss the rules that map Service
  # addresses back.
  in_ns "$ns" sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true
}

plug_host() {
  ip -o addr show dev "$HOST_LINK" 2>/dev/null | grep "inet $HOST_IP/" >/dev/null && in_ns "$NS_LAN" ip link show phost >/dev/null 2>&1 && return 0
  ip link del "$HOST_LINK" 2>/dev/null || true
  ip link add "$HOST_LINK" type veth peer name phost netns "$NS_LAN"
  in_ns "$NS_LAN" ip link set phost master br0 up
  ip addr add "$HOST_IP"/24 dev "$HOST_LINK"
  ip link set "$HOST_LINK" up
}

# lan_up NODES: idempotent; a higher number adds nodes.
lan_up() {
  local count=$1 i ns
  make_ns "$NS_LAN"
  in_ns "$NS_LAN" ip link show br0 >/dev/null 2>&1 || in_ns "$NS_LAN" ip link add br0 type bridge
  in_ns "$NS_LAN" ip link set br0 up
  plug_host
  make_ns "$NS_CONTROL"
  plug "$NS_CONTROL" "$CONTROL_IP" pcp
  for i in $(seq "$count"); do
    make_ns "$(node_netns "$i")"
    plug "$(node_netns "$i")" "$(node_ip "$i")" "pn$i"
  done
  # The API server must reach pods too (aggregated APIs, webhooks), hence routes in the control plane as well.
  for i in $(seq "$count"); do
    for ns in $NS_CONTROL $(for n in $(seq "$count"); do node_netns "$n"; done); do
      [ "$ns" = "$(node_netns "$i")" ] || in_ns "$ns" ip route replace "10.244.$i.0/24" via "$(node_ip "$i")"
    done
  done
}

our_namespaces() {
  local path
  for path in /run/netns/tf-lan /run/netns/tf-cp /run/netns/tf-n[1-9]; do [ -e "$path" ] && basename "$path"; done
  return 0
}

lan_down() {
  local ns
  ip link del "$HOST_LINK" 2>/dev/null || true
  for ns in $(our_namespaces); do ip netns del "$ns" 2>/dev/null || rm -f "/run/netns/$ns"; done
}
