#!/usr/bin/env bash
# fuzz.sh SECONDS: runs every fuzz target of e2e/fuzz for that many seconds of processor time, two at a time,
# and prints the failing inputs. FUZZ_SEED selects another sequence of mutations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${1:?usage: fuzz.sh SECONDS}
targets() { cargo test --locked --profile ci --workspace --test targets -- "$@"; }

# The list goes through the same command as the runs, so the first one builds and the others only start.
mapfile -t names < <(targets --list --format terse | sed -n 's/: test$//p' | grep -v '^seeds::')
[ ${#names[@]} -gt 0 ] || { echo "no fuzz targets"; exit 1; }
echo "${#names[@]} targets, $seconds s of processor time each, two at a time"
export -f targets
printf '%s\n' "${names[@]}" | FUZZ_SECONDS=$seconds xargs -P 2 -I NAME bash -c 'targets --exact NAME --nocapture'
