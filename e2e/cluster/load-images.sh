#!/usr/bin/env bash
# load-images.sh ARCHIVE...: puts image archives (of e2e/images/pack.py) into every node of the running
# cluster that does not have them yet. Without a running cluster it says so and does nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
for part in process nodes system-images; do source "$CLUSTER_SRC/$part.sh"; done
if ! cluster_runs; then say "no cluster runs: nothing to load into"; exit 0; fi
take_lock
# Entering a node changes the working folder, hence the absolute path.
for archive in "$@"; do load_everywhere "$(realpath -e "$archive")"; done
