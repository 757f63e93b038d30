#!/usr/bin/env bash
# operator.sh: our operator and KServe's manager, each with many models on fake nodes of the cluster of this
# machine, one after the other in one run; prints the table of ratios and writes a JSON report. KServe is
# built from its public Go module; where that fails it is left out, and the output says so.
#   OPERATOR_BENCH_MODELS=100   models of each run (1000)
#   OPERATOR_BENCH_RATE=0       models a second of the second run (10); 0: without it
#   OPERATOR_BENCH_ALONE=0      models of the third run, of ours alone (5000); 0: without it
#   OPERATOR_BENCH_ONLY=10/s    only the runs whose name starts so: at-once, 10/s, alone
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
for part in process certs control; do source "$CLUSTER_SRC/$part.sh"; done

cd "$REPO_DIR"
KSERVE_VERSION=v0.20.0
KSERVE_SRC=$CACHE/kserve-$KSERVE_VERSION
SYSTEM_NAMESPACE=trustformers-system
bench_state=$(mktemp -d)

# A controller's own limits must be measured, and not those of Kubernetes' controllers, which write 20
# objects a second unless told otherwise.
restart_controllers() { # ARGUMENT...: further arguments of both
  stop 20 kube-controller-manager kube-scheduler
  CONTROLLER_ARGUMENTS="$*" start_controllers
}

cleanup() {
  restart_controllers
  rm -rf "$bench_state"
}

# kubeconfig_of NAMESPACE ACCOUNT: the administrator's, with the token of a ServiceAccount instead. The
# administrator's certificate is exempt from priority and fairness.
kubeconfig_of() {
  local token
  token=$(kc -n "$1" create token "$2" --duration=6h)
  kc config view --raw --minify -o json | TOKEN=$token python3 -c 'import json, os, sys
config = json.load(sys.stdin)
config["users"][0]["user"] = {"token": os.environ["TOKEN"]}
json.dump(config, sys.stdout)'
}

# The objects of these kinds in a file of several.
objects_of() { # FILE KIND...
  kc create --dry-run=client -f "$1" -o json | python3 -c 'import json, sys
text, decoder, found = sys.stdin.read().strip(), json.JSONDecoder(), []
while text:
    one, end = decoder.raw_decode(text)
    text = text[end:].strip()
    found += one["items"] if one["kind"] == "List" else [one]
found = [one for one in found if one["kind"] in sys.argv[1:]]
json.dump({"apiVersion": "v1", "kind": "List", "items": found}, sys.stdout)' "${@:2}"
}

install_ours() {
  kc apply --server-side -f k8s/00-namespace.yaml -f k8s/10-inferencemodels.yaml -f k8s/11-abtests.yaml >/dev/null
  objects_of k8s/20-trustformers.yaml ServiceAccount ClusterRole ClusterRoleBinding Role RoleBinding |
    kc apply --server-side -f - >/dev/null
  kc wait --for=condition=Established crd/{inferencemodels,abtests}.serving.trustformers.dev --timeout=60s >/dev/null
  kubeconfig_of "$SYSTEM_NAMESPACE" trustformers-operator >"$bench_state/operator.kubeconfig"
}

# The module's own go.mod replaces some of its dependencies, which Go honours only in the main module. So it
# is built as such from a copy of its source, which the checksum database has verified.
build_kserve() {
  local dir
  [ -x "$KSERVE_SRC/manager" ] && return 0
  command -v go >/dev/null || return 1
  dir=$(cd "$bench_state" && GOFLAGS=-mod=mod go mod download -json "github.com/kserve/kserve@$KSERVE_VERSION" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])') || return 1
  rm -rf "$KSERVE_SRC"
  cp -r "$dir" "$KSERVE_SRC" && chmod -R u+w "$KSERVE_SRC" || return 1
  say "building KServe $KSERVE_VERSION ..."
  (cd "$KSERVE_SRC" && GOWORK=off CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags "-s -w" -o manager.part ./cmd/manager >&2) &&
    mv "$KSERVE_SRC/manager.part" "$KSERVE_SRC/manager"
}

# KServe's own settings, with plain Deployments and without an ingress.
kserve_config() {
  kc create --dry-run=client -f "$KSERVE_SRC/config/configmap/inferenceservice.yaml" -o json | python3 -c 'import json, sys
config = json.load(sys.stdin)
config["metadata"] = {"name": "inferenceservice-config", "namespace": "kserve"}
data = config["data"]
data.pop("_example", None)
data["deploy"] = json.dumps({"defaultDeploymentMode": "Standard"})
ingress = json.loads(data["ingress"])
ingress.update(disableIngressCreation=True, disableIstioVirtualHost=True, enableGatewayApi=False)
data["ingress"] = json.dumps(ingress)
json.dump(config, sys.stdout)'
}

install_kserve() {
  local crd certs
  kc create namespace kserve --dry-run=client -o yaml | kc apply --server-side -f - >/dev/null
  kc -n kserve create serviceaccount kserve-controller-manager --dry-run=client -o yaml | kc apply --server-side -f - >/dev/null
  kc create clusterrolebinding kserve-bench --clusterrole=cluster-admin --serviceaccount=kserve:kserve-controller-manager \
    --dry-run=client -o yaml | kc apply --server-side -f - >/dev/null
  for crd in "$KSERVE_SRC"/config/crd/full/serving*.yaml "$KSERVE_SRC"/config/crd/full/clusterstoragecontainer/*.yaml; do
    case $crd in *kustomization*) ;; *) kc apply --server-side -f "$crd" >/dev/null ;; esac
  done
  kserve_config | kc apply --server-side -f - >/dev/null
  kc wait --for=condition=Established crd --all --timeout=60s >/dev/null
  kubeconfig_of kserve kserve-controller-manager >"$bench_state/kserve.kubeconfig"
  # No object is sent to its webhooks; it does not start without a certificate.
  certs=$bench_state/k8s-webhook-server/serving-certs
  mkdir -p "$certs"
  openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=kserve -keyout "$certs/tls.key" -out "$certs/tls.crt" 2>/dev/null
}

trap cleanup EXIT
say "building the operator ..."
# With --workspace the same features are chosen as in the tests, so nothing is compiled twice.
cargo build --locked --profile ci --workspace --bin trustformers-operator
# A fake node takes 250 pods: 24 × 250 = 6,000.
"$CLUSTER_SRC/up.sh" --with kwok=24 >/dev/null
take_lock
restart_controllers --kube-api-qps=2000 --kube-api-burst=4000
install_ours
kserve=()
if build_kserve; then
  install_kserve
  kserve=(--kserve "$KSERVE_SRC/manager" --kserve-kubeconfig "$bench_state/kserve.kubeconfig")
else
  say "KServe could not be built: it is left out"
fi
read -r apiserver_pid _ <"$STATE/run/kube-apiserver.pid"
mkdir -p "$REPORT_DIR"
"$CLUSTER_SRC/client.sh" python3 "$E2E_DIR/bench/control_plane.py" --count "${OPERATOR_BENCH_MODELS:-1000}" --rate "${OPERATOR_BENCH_RATE:-10}" \
  --alone "${OPERATOR_BENCH_ALONE:-5000}" --only "${OPERATOR_BENCH_ONLY:-}" \
  --kubectl "$BIN/kubectl" --kubeconfig "$OUR_KUBECONFIG" --apiserver-pid "$apiserver_pid" \
  --operator "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/trustformers-operator" \
  --operator-kubeconfig "$bench_state/operator.kubeconfig" "${kserve[@]}" \
  --logs "$STATE/log/bench" --report "$REPORT_DIR/bench-operator.json"
