#!/usr/bin/env bash
# preflight.sh cluster|build: checks this machine. On Debian as root, packages that are missing are
# installed; anything else that is wrong is printed at once, each with the line to type, and nothing has been
# changed then.
#   build    compile and test the workspace, pack images
#   cluster  the same, and run Kubernetes on this machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$CLUSTER_SRC/cgroups.sh"
purpose=${1:-cluster}

# command:package of Debian and Ubuntu
BUILD_TOOLS=(gcc:gcc make:make strip:binutils python3:python3 pip3:python3-pip curl:curl git:git flock:util-linux)
CLUSTER_TOOLS=(pkg-config:pkg-config openssl:openssl ip:iproute2 nft:nftables iptables:iptables conntrack:conntrack
  nsenter:util-linux unshare:util-linux sysctl:procps setsid:util-linux)
# file:package, for what is no command
BUILD_FILES=(/usr/include/stdio.h:libc6-dev /etc/ssl/certs/ca-certificates.crt:ca-certificates)
CLUSTER_FILES=(/usr/include/seccomp.h:libseccomp-dev)
GO_WANTED=1.26.4
BUILD_DISK_GB=12
CLUSTER_DISK_GB=14   # Go's caches about 11 GB after a first build, binaries 0.9, images and models 0.5

problems=()
problem() { problems+=("$1"); }

missing_packages() {
  local item tools=("${BUILD_TOOLS[@]}") files=("${BUILD_FILES[@]}")
  [ "$purpose" = cluster ] && tools+=("${CLUSTER_TOOLS[@]}") files+=("${CLUSTER_FILES[@]}")
  {
    for item in "${tools[@]}"; do command -v "${item%%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${item%%:*}" ] || echo "${item##*:}"; done
    for item in "${files[@]}"; do [ -e "${item%%:*}" ] || echo "${item##*:}"; done
  } | sort -u
}

check_packages() {
  local packages
  mapfile -t packages < <(missing_packages)
  [ ${#packages[@]} != 0 ] || return 0
  if [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ]; then
    say "installing ${packages[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >&2 ||
      problem "apt-get could not install: ${packages[*]}"
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} = 0 ] || problem "still missing after installing: ${packages[*]}"
  elif [ -f /etc/debian_version ]; then
    problem "missing packages. Type:  sudo apt-get install -y --no-install-recommends ${packages[*]}"
  else
    problem "missing (Debian's package names): ${packages[*]}. Install them with this system's package manager"
  fi
}

check_languages() {
  local go_version
  if ! command -v cargo >/dev/null; then
    problem "cargo is missing. Type:  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
  else
    check_rust
  fi
  [ "$purpose" = cluster ] || return 0
  if ! command -v go >/dev/null; then
    problem "go is missing (it builds Kubernetes). See https://go.dev/doc/install; $GO_WANTED or newer"
    return
  fi
  go_version=$(go env GOVERSION)
  [ "$(printf '%s\n' "$GO_WANTED" "${go_version#go}" | sort -V | head -1)" = "$GO_WANTED" ] ||
    problem "go is ${go_version#go}: $GO_WANTED or newer is needed. See https://go.dev/doc/install"
}

# rustup brings the toolchain of rust-toolchain.toml by itself; a cargo of the distribution has to be new
# enough.
check_rust() {
  local wanted found
  command -v rustup >/dev/null && return 0
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$REPO_DIR/Cargo.toml")
  found=$(cargo --version | awk '{ print $2 }')
  [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -1)" = "$wanted" ] ||
    problem "cargo is $found: $wanted or newer is needed. Type:  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
}

check_kernel() {
  local module
  [ "$(uname -s)" = Linux ] || { problem "this is $(uname -s): the cluster needs Linux"; return; }
  case $(uname -m) in x86_64 | aarch64) ;; *) problem "$(uname -m): the images are made for x86_64 and aarch64" ;; esac
  [ "$(id -u)" = 0 ] || { problem "the cluster needs root (namespaces, mounts, cgroups). Type:  sudo -E env PATH=\"\$PATH\" make ..."; return; }
  if [ "$(cgroup_version)" = 2 ]; then
    for module in cpu cpuset memory pids; do
      grep -qw $module /sys/fs/cgroup/cgroup.controllers || problem "cgroup v2 has no $module controller at /sys/fs/cgroup"
    done
  else
    for module in cpu cpuset memory pids; do
      [ -d /sys/fs/cgroup/$module ] || problem "cgroup v1 has no $module hierarchy under /sys/fs/cgroup"
    done
  fi
  [ -w /sys/fs/cgroup ] || problem "/sys/fs/cgroup is read-only (a container?): use a virtual machine, or a privileged container with --cgroupns=host"
  # Built into some kernels, modules in others; loading what is there already does nothing.
  for module in overlay br_netfilter veth nf_tables; do modprobe -q $module 2>/dev/null || true; done
  grep -qw overlay /proc/filesystems || problem "the kernel has no overlay file system (modprobe overlay)"
  [ -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || problem "the kernel has no bridge filter (modprobe br_netfilter)"
}

# Addresses of the benchmarking range of RFC 2544, which no network should use; where one does, the cluster is
# not started.
check_network() {
  local used
  used=$({ ip -4 -o addr show; ip -4 route show; } | grep -E '\b198\.18\.0\.[0-9]+' | grep -v "$HOST_LINK" || true)
  [ -z "$used" ] || problem "198.18.0.0/24 is in use by something else: $(head -1 <<<"$used")"
}

check_places() {
  local free_gb wanted_gb=$BUILD_DISK_GB
  [ "$purpose" = cluster ] && wanted_gb=$CLUSTER_DISK_GB
  case $CACHE in
    /run/* | /var/lib/* | /var/log/*) problem "the cache $CACHE lies where each node has a folder of its own. Type:  export XDG_CACHE_HOME=/opt/cache" ;;
    *[[:space:]]*) problem "the cache $CACHE has a blank in its name. Type:  export XDG_CACHE_HOME=/opt/cache" ;;
  esac
  # Once the binaries are there, far less is needed.
  [ "$(find "$BIN_STORE" -type f -name 'kube*' 2>/dev/null | wc -l)" -ge 6 ] && wanted_gb=4
  mkdir -p "$CACHE"
  free_gb=$(df -BG --output=avail "$CACHE" | tail -1 | tr -dc 0-9)
  [ "$free_gb" -ge "$wanted_gb" ] || problem "$free_gb GB free at $CACHE: $wanted_gb GB are needed (another place: export XDG_CACHE_HOME=...)"
}

check_packages
check_languages
check_places
if [ "$purpose" = cluster ]; then
  check_kernel
  command -v ip >/dev/null && check_network
fi
[ ${#problems[@]} = 0 ] && exit 0
{
  echo "this machine is not ready:"
  printf '  - %s\n' "${problems[@]}"
  if [ "$purpose" = cluster ]; then
    echo "without a cluster, the same runtime in one process:"
    echo "  cargo run --release --bin trustformers-serve -- generate --model MODEL.gguf --prompt 'Hello'"
  fi
} >&2
exit 1
