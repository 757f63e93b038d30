# Building the gateway and its bench, and the cores and descriptors that proxies get. Sourced.

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
BENCH_GATEWAY=${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/trustformers-gateway
BENCH_PROCESSES=$(mktemp)
export BENCH_GATEWAY BENCH_PROXY_CORE BENCH_PROCESSES

# Proxies that are left where the measurement was killed.
end_left() {
  local process
  while read -r process; do
    case $({ tr '\0' ' ' <"/proc/$process/cmdline"; } 2>/dev/null || true) in
      *"$BENCH_GATEWAY"* | *"${BENCH_ENVOY:-no envoy}"* | *"${BENCH_NGINX:-no nginx}"* | *"${BENCH_SGLANG:-no router}"* | *"nginx: master"*) kill "$process" || true ;;
    esac
  done <"$BENCH_PROCESSES"
  rm -f "$BENCH_PROCESSES"
}

# With --workspace the same features are chosen for dependencies as by the tests, so none is compiled twice.
# TRUSTFORMERS_BUILT=1: the programs are there already.
build_gateway() {
  [ -z "${TRUSTFORMERS_BUILT:-}" ] || return 0
  say "building the gateway ..."
  cargo build --locked --profile ci --workspace --bin trustformers-gateway
  cargo bench --locked --profile ci --workspace --bench peers --no-run
}

# run_peers LIMIT_S: the bench on its cores, ended after LIMIT_S seconds.
run_peers() {
  # A stream has one or two descriptors in a proxy, one in the program with its caller, and at most one in
  # that with the pod. Where the hard limit may not be raised, as many as it has must do.
  ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
  "${pinned[@]}" timeout --kill-after=30 "$1" cargo bench --locked --profile ci --workspace --bench peers
}
