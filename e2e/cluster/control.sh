# Starting the control plane (etcd, API server, controllers, scheduler) in the namespace tf-cp. Sourced.

CONTROL_BINARIES=(etcd kube-apiserver kube-controller-manager kube-scheduler kubectl)

start_control() { start "$1" nsenter --net="/run/netns/$NS_CONTROL" env PATH="$BIN:$PATH" "${@:2}"; }

start_apiserver() {
  local local_etcd=http://127.0.0.1:2379
  # Nothing here outlives the machine, so etcd need not wait for the disk.
  start_control etcd "$BIN/etcd" --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls $local_etcd --advertise-client-urls $local_etcd --listen-peer-urls http://127.0.0.1:2380
  # Aggregated APIs are reached by pod address (no kube-proxy runs beside the API server):
  # enable-aggregator-routing.
  start_control kube-apiserver "$BIN/kube-apiserver" --etcd-servers=$local_etcd --advertise-address="$CONTROL_IP" --secure-port=6443 \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/authority.crt" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true --service-cluster-ip-range="$SERVICE_CIDR" \
    --kubelet-client-certificate="$PKI/apiserver-to-kubelet.crt" --kubelet-client-key="$PKI/apiserver-to-kubelet.key" \
    --kubelet-certificate-authority="$PKI/authority.crt" --kubelet-preferred-address-types=InternalIP \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-key-file="$PKI/service-accounts.pub" --service-account-signing-key-file="$PKI/service-accounts.key" \
    --requestheader-client-ca-file="$PKI/front-proxy-authority.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$PKI/front-proxy.crt" --proxy-client-key-file="$PKI/front-proxy.key" --enable-aggregator-routing=true
}

apiserver_ready() { kc --request-timeout=5s get --raw /readyz; }

# Further arguments of both controllers are words of CONTROLLER_ARGUMENTS: a benchmark lifts their limits.
start_controllers() {
  local further=()
  read -ra further <<<"${CONTROLLER_ARGUMENTS:-}"
  # The short autoscaler and node periods make scenarios quick: they are the only settings that differ from a
  # plain cluster.
  start_control kube-controller-manager "$BIN/kube-controller-manager" --leader-elect=false --use-service-account-credentials \
    --kubeconfig="$PKI/controller-manager.kubeconfig" --authentication-kubeconfig="$PKI/controller-manager.kubeconfig" \
    --authorization-kubeconfig="$PKI/controller-manager.kubeconfig" --root-ca-file="$PKI/authority.crt" \
    --service-account-private-key-file="$PKI/service-accounts.key" \
    --cluster-signing-cert-file="$PKI/authority.crt" --cluster-signing-key-file="$PKI/authority.key" \
    --node-monitor-grace-period=20s --horizontal-pod-autoscaler-sync-period=2s \
    --horizontal-pod-autoscaler-initial-readiness-delay=2s --horizontal-pod-autoscaler-cpu-initialization-period=10s "${further[@]}"
  start_control kube-scheduler "$BIN/kube-scheduler" --leader-elect=false --kubeconfig="$PKI/scheduler.kubeconfig" \
    --authentication-kubeconfig="$PKI/scheduler.kubeconfig" --authorization-kubeconfig="$PKI/scheduler.kubeconfig" \
    "${further[@]}"
}
