#!/usr/bin/env bash
# dump.sh FOLDER: saves the state of the cluster before it is removed: objects, events, logs of
# pods and daemons.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
# A part that fails must not prevent the others.
set +e
folder=$1
mkdir -p "$folder/pods"
cp -r "$STATE/log" "$folder/daemons" 2>/dev/null
kc get all,imodel,lease,configmap,endpointslice -A -o wide >"$folder/objects.txt" 2>&1
kc get imodel -A -o yaml >"$folder/imodels.yaml" 2>&1
kc get events -A --sort-by=.lastTimestamp >"$folder/events.txt" 2>&1
kc describe nodes,pods,imodel -A >"$folder/describe.txt" 2>&1
kc get pods -A --no-headers 2>/dev/null | while read -r namespace pod _; do
  kc -n "$namespace" logs "$pod" --all-containers --prefix >"$folder/pods/$namespace.$pod.log" 2>&1
  kc -n "$namespace" logs "$pod" --all-containers --prefix --previous >"$folder/pods/$namespace.$pod.previous.log" 2>/dev/null ||
    rm -f "$folder/pods/$namespace.$pod.previous.log"
done
echo "the state of the cluster is in $folder"
