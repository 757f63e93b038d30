# Certificates and kubeconfigs, made with openssl for each start of the cluster and deleted with it. Sourced.

PKI=$STATE/pki
CERT_DAYS=30

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

authority() {
  [ -f "$PKI/$1.crt" ] && return 0
  new_key "$PKI/$1.key"
  openssl req -x509 -new -key "$PKI/$1.key" -days $CERT_DAYS -subj "/CN=trustformers-e2e-$1" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign -out "$PKI/$1.crt"
}

# certificate NAME AUTHORITY SUBJECT USAGE [ALTERNATIVE_NAMES]; USAGE is clientAuth or serverAuth.
certificate() {
  local name=$1 authority=$2 subject=$3 usage=$4 names=${5:-}
  [ -f "$PKI/$name.crt" ] && return 0
  new_key "$PKI/$name.key"
  openssl req -new -key "$PKI/$name.key" -subj "$subject" |
    openssl x509 -req -CA "$PKI/$authority.crt" -CAkey "$PKI/$authority.key" -set_serial "0x$(openssl rand -hex 12)" -days $CERT_DAYS \
      -extfile <(echo "extendedKeyUsage=$usage"; [ -z "$names" ] || echo "subjectAltName=$names") -out "$PKI/$name.crt.part" 2>/dev/null
  mv "$PKI/$name.crt.part" "$PKI/$name.crt"
}

# kubeconfig NAME: prints one for the client certificate of that name.
kubeconfig() {
  cat <<END
apiVersion: v1
kind: Config
current-context: $CONTEXT
contexts:
- name: $CONTEXT
  context: {cluster: $CONTEXT, user: $1}
clusters:
- name: $CONTEXT
  cluster:
    server: https://$CONTROL_IP:6443
    certificate-authority-data: $(base64 -w0 "$PKI/authority.crt")
users:
- name: $1
  user:
    client-certificate-data: $(base64 -w0 "$PKI/$1.crt")
    client-key-data: $(base64 -w0 "$PKI/$1.key")
END
}

client() { # NAME SUBJECT: certificate and kubeconfig of a client of the API server
  certificate "$1" authority "$2" clientAuth
  [ -f "$PKI/$1.kubeconfig" ] || kubeconfig "$1" >"$PKI/$1.kubeconfig"
}

control_certs() {
  mkdir -p "$PKI"
  chmod 700 "$PKI"
  authority authority
  authority front-proxy-authority
  if [ ! -f "$PKI/service-accounts.pub" ]; then
    new_key "$PKI/service-accounts.key"
    openssl pkey -in "$PKI/service-accounts.key" -pubout -out "$PKI/service-accounts.pub"
  fi
  local service=kubernetes.default.svc
  certificate apiserver authority /CN=kube-apiserver serverAuth \
    "DNS:kubernetes,DNS:kubernetes.default,DNS:$service,DNS:$service.cluster.local,DNS:localhost,IP:127.0.0.1,IP:$API_SERVICE_IP,IP:$CONTROL_IP"
  certificate apiserver-to-kubelet authority /O=system:masters/CN=kube-apiserver-to-kubelet clientAuth
  certificate front-proxy front-proxy-authority /CN=front-proxy-client clientAuth
  client admin /O=system:masters/CN=trustformers-e2e-admin
  client controller-manager /CN=system:kube-controller-manager
  client scheduler /CN=system:kube-scheduler
  client proxy /CN=system:kube-proxy
  cp "$PKI/admin.kubeconfig" "$OUR_KUBECONFIG"
  chmod 600 "$OUR_KUBECONFIG"
}

node_certs() { # NUMBER
  client "kubelet$1" "/O=system:nodes/CN=system:node:$(node_name "$1")"
  certificate "kubelet$1-serving" authority "/CN=$(node_name "$1")" serverAuth "DNS:$(node_name "$1"),IP:$(node_ip "$1")"
}
