#!/usr/bin/env bash
# status.sh: prints the state of the cluster. Exit status 0: up and whole; 1: broken; 3: there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
for part in process cgroups lan sysctls leftovers; do source "$CLUSTER_SRC/$part.sh"; done

if count_leftovers >/dev/null; then echo "there is no cluster (make cluster-up)"; exit 3; fi
echo "state:      $STATE"
echo "kubeconfig: $OUR_KUBECONFIG"
echo "logs:       $STATE/log"
echo "on this machine: $(count_leftovers || true)"
dead=
for record in "$STATE"/run/*.pid; do
  [ -e "$record" ] || continue
  name=$(basename "$record" .pid)
  if alive "$name"; then condition=runs; else condition=DEAD dead=1; fi
  printf '  %-26s %s %s\n' "$name" "$condition" "$(cut -d' ' -f1 "$record")"
done
[ -f "$STATE/complete" ] && [ -z "$dead" ] || { echo "broken: make cluster-up replaces it, make cluster-down removes it"; exit 1; }
kc get nodes -o wide
kc get pods -A -o wide
