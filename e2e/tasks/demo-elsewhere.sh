#!/usr/bin/env bash
# demo-elsewhere.sh: the demo on a cluster of the user's, the one that KUBECONFIG names. That cluster must be
# able to pull our images, so IMAGE_REGISTRY must name where they were pushed to.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
source "$E2E_DIR/tasks/timing.sh"
source "$E2E_DIR/tasks/install.sh"
source "$E2E_DIR/tasks/forward.sh"

for tool in kubectl helm; do
  if ! command -v $tool >/dev/null; then "$CLUSTER_SRC/binaries.sh" link "$CACHE/tools" $tool; fi
done
PATH=$PATH:$CACHE/tools
context=$(kubectl config current-context) || fail "KUBECONFIG=$KUBECONFIG has no current context" "kubectl config use-context NAME"
echo "context: $context (KUBECONFIG=$KUBECONFIG)"

[ -n "${IMAGE_REGISTRY:-}" ] || fail "IMAGE_REGISTRY is not set: where can $context pull our images from?" \
  "build and push them:  for p in operator gateway runtime; do docker build --target \$p -t REGISTRY/trustformers-\$p:TAG . && docker push REGISTRY/trustformers-\$p:TAG; done" \
  "then:                 make demo IMAGE_REGISTRY=REGISTRY IMAGE_TAG=TAG MODEL_URI=oci://..."
[ -n "${IMAGE_TAG:-}" ] || fail "IMAGE_TAG is not set: which tag have the images at $IMAGE_REGISTRY?"
[ -n "${MODEL_URI:-}" ] || fail "MODEL_URI is not set: where can $context get a model from?" \
  "oci://REGISTRY/IMAGE:TAG (an image that holds a .gguf file; needs Kubernetes 1.35 or newer), or pvc://CLAIM/PATH in namespace $DEMO_NAMESPACE"
kubectl get --raw /readyz >/dev/null || fail "the API server of $context is not ready or does not answer"

step "helm install trustformers ./charts/trustformers" install_chart --set-string "image.tag=$IMAGE_TAG" --set-string "image.registry=$IMAGE_REGISTRY"
step "kubectl apply of the model" apply_model "$MODEL_URI"
step "until it is ready" await_model
start_forward
kubectl -n "$DEMO_NAMESPACE" get imodel "$DEMO_MODEL"
step "a request through the gateway" python3 "$E2E_DIR/tasks/prompt.py" "$FORWARD_ADDRESS" "$DEMO_MODEL" "The capital of France is"
print_steps
curl_line "$FORWARD_ADDRESS"
echo "
End it:       make demo-down (with the same KUBECONFIG)"
