# Installing the chart and a model for the demo, on whichever cluster KUBECONFIG names. Sourced.

SYSTEM_NAMESPACE=trustformers-system
DEMO_NAMESPACE=trustformers-demo
DEMO_LABEL=app.kubernetes.io/created-by=trustformers-demo
DEMO_MODEL=smollm2

# The labelled namespaces are listed, since a name and a selector do not go together.
is_demos() {
  local names
  names=$(kubectl get namespaces -l "$DEMO_LABEL" -o 'jsonpath={.items[*].metadata.name}') || fail "could not list namespaces of $(kubectl config current-context)"
  [[ " $names " == *" $1 "* ]]
}

# On a cluster of the user's the demo only ever changes namespaces that it made itself.
demo_namespace() {
  if [ -n "$(kubectl get namespace "$1" -o name --ignore-not-found)" ]; then
    [ "$KUBECONFIG" = "$OUR_KUBECONFIG" ] || is_demos "$1" || fail "namespace $1 exists already and is not the demo's" "the demo would change what is installed there: use another cluster"
    return 0
  fi
  kubectl create namespace "$1" >/dev/null
  kubectl label namespace "$1" "$DEMO_LABEL" >/dev/null
}

# install_chart ARGUMENT...: further arguments go to helm.
install_chart() {
  demo_namespace $SYSTEM_NAMESPACE
  helm upgrade --install trustformers "$REPO_DIR/charts/trustformers" --namespace $SYSTEM_NAMESPACE --wait --timeout 180s "$@" >/dev/null ||
    { kubectl -n $SYSTEM_NAMESPACE get pods -o wide >&2; kubectl -n $SYSTEM_NAMESPACE get events --sort-by=.lastTimestamp | tail -15 >&2; fail "the chart did not become ready"; }
}

apply_model() { # URI
  demo_namespace $DEMO_NAMESPACE
  sed "s#oci://localhost/smollm2-135m-instruct:q4_1#$1#" "$REPO_DIR/examples/smollm2.yaml" | tee /dev/stderr | kubectl -n $DEMO_NAMESPACE apply -f - >&2
}

# Shows each change of the model's state until it is ready.
await_model() {
  local end=$((SECONDS + 300)) line last=
  while :; do
    line=$(kubectl -n $DEMO_NAMESPACE get imodel $DEMO_MODEL -o 'jsonpath={.status.phase}: {.status.conditions[?(@.type=="Ready")].message}')
    [ "$line" = "$last" ] || [ "$line" = ": " ] || say "  $line"
    last=$line
    [ "$(kubectl -n $DEMO_NAMESPACE get imodel $DEMO_MODEL -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" != True ] || return 0
    [ $SECONDS -lt $end ] || { kubectl -n $DEMO_NAMESPACE describe imodel $DEMO_MODEL >&2; fail "the model was not ready after 300 s"; }
    sleep 0.2
  done
}

curl_line() { # ADDRESS
  cat <<END

Send a request:
  curl -s --noproxy '*' $1/v1/generate -H 'content-type: application/json' -d '{"model": "$DEMO_MODEL", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'
  curl -sN --noproxy '*' $1/v1/generate/stream -H 'content-type: application/json' -d '{"model": "$DEMO_MODEL", "prompt": "Once upon a time", "max_tokens": 64}'
END
}
