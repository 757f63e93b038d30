# Names, places and addresses of the test cluster. Sourced by every script here; it only sets variables and
# defines functions that all scripts use.

E2E_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO_DIR=$(cd "$E2E_DIR/.." && pwd)
CLUSTER_SRC=$E2E_DIR/cluster

# The cache is resolved to its real path, because mounts are listed by the kernel under real paths.
CACHE=$(realpath -m "${XDG_CACHE_HOME:-$HOME/.cache}/trustformers")
BIN_STORE=$CACHE/bin
STATE=$CACHE/cluster            # everything that `down` deletes
LOCK_FILE=$CACHE/cluster.lock   # beside STATE, so that deleting STATE does not release the lock
IMAGE_STORE=$CACHE/images
MODEL_STORE=$CACHE/models
REPORT_DIR=$CACHE/report
OUR_KUBECONFIG=$STATE/kubeconfig
BIN=$STATE/bin                  # symbolic links to the binaries that this cluster was started with

# The network: one bridge in a namespace of its own; this machine, the control plane and the nodes plug into
# it.
LAN=198.18.0.0/24
HOST_IP=198.18.0.1
CONTROL_IP=198.18.0.2
NOWHERE_IP=198.18.0.254         # default route of every namespace: no host has it, so nothing leaves the machine
SERVICE_CIDR=10.96.0.0/16
API_SERVICE_IP=10.96.0.1
DNS_IP=10.96.0.10
POD_CIDR=10.244.0.0/16
NS_LAN=tf-lan
NS_CONTROL=tf-cp
HOST_LINK=tf-host
CGROUP=trustformers-e2e         # one cgroup subtree, so that every process of ours can be found after a crash
MAX_NODES=9                     # one digit: node N is 198.18.0.1N, its pods are 10.244.N.0/24
CONTEXT=trustformers-e2e

# The cluster is reached without a proxy, whatever the environment configures for other addresses.
export NO_PROXY="${NO_PROXY:+$NO_PROXY,}localhost,127.0.0.1,198.18.0.0/24,10.96.0.0/16,10.244.0.0/16,.svc,.cluster.local"
export no_proxy=$NO_PROXY

node_name() { echo "node$1"; }
node_ip() { echo "198.18.0.1$1"; }
node_netns() { echo "tf-n$1"; }
node_dir() { echo "$STATE/node$1"; }
nodes_up() { cat "$STATE/nodes" 2>/dev/null || echo 0; }

STARTED_AT=$SECONDS
say() { printf '[%4d s] %s\n' $((SECONDS - STARTED_AT)) "$*" >&2; }
fail() { printf 'error: %s\n' "$1" >&2; shift; for line in "$@"; do printf '       %s\n' "$line" >&2; done; exit 1; }

# Only one script at a time may change the cluster. Children must not inherit descriptor 9 (see process.sh): a
# daemon that holds it would never release the lock.
take_lock() {
  [ -n "${TRUSTFORMERS_CLUSTER_LOCKED:-}" ] && return 0
  mkdir -p "$CACHE"
  exec 9>"$LOCK_FILE"
  flock --nonblock 9 || { say "another run is changing the cluster: waiting for it"; flock 9; }
  export TRUSTFORMERS_CLUSTER_LOCKED=1
}

# `kubectl` against our own cluster, whatever KUBECONFIG says.
kc() { KUBECONFIG='' "$BIN/kubectl" --kubeconfig "$OUR_KUBECONFIG" "$@" 9>&-; }

# A rule for all scripts here: no `| grep -q`. It ends at the first match, the writer then dies of a closed
# pipe, and with
# `pipefail` that is a failure, now and then.

# wait_until SECONDS WHAT COMMAND...: polls ten times a second; the error at the limit names what was awaited
# and where the logs are.
wait_until() {
  local limit_s=$1 what=$2 end
  shift 2
  end=$((SECONDS + limit_s))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "$what did not happen within $limit_s s" "logs: $STATE/log"
    sleep 0.1
  done
}
