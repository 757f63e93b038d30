#!/usr/bin/env bash
# down.sh: stops the cluster, removes everything that it made, also after a crash, and prints what is left.
# Pods get no time to terminate. Binaries, images and models stay cached.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$CLUSTER_SRC/process.sh"
source "$CLUSTER_SRC/cgroups.sh"
source "$CLUSTER_SRC/lan.sh"
source "$CLUSTER_SRC/sysctls.sh"
source "$CLUSTER_SRC/leftovers.sh"

[ "$(id -u)" = 0 ] || fail "the cluster runs as root: run this as root too"
take_lock
if count_leftovers >/dev/null; then
  say "there is no cluster"
else
  names=()
  for record in "$STATE"/run/*.pid; do [ -e "$record" ] && names+=("$(basename "$record" .pid)"); done
  # Those that would start things again are ended first; the rest follows by cgroup.
  mapfile -t starters < <(printf '%s\n' "${names[@]}" | grep -E '^(kubelet|kube-controller-manager|kwok)')
  mapfile -t daemons < <(printf '%s\n' "${names[@]}" | grep -v -e '^space' -e '^$')
  [ ${#starters[@]} = 0 ] || stop 5 "${starters[@]}"
  [ ${#daemons[@]} = 0 ] || stop 3 "${daemons[@]}"
  remove_leftovers
fi
if left=$(count_leftovers); then say "down: $left are left"; else fail "not everything could be removed: $left"; fi
