#!/usr/bin/env bash
# node-space.sh FOLDER: runs inside a fresh mount namespace, gives the node its own /run, /var/lib and
# /var/log, and then sleeps to keep the namespace. The node's daemons enter it.
#
# Why: kubelet and containerd have paths of their own that no setting moves (device plugin sockets, shim
# sockets, links to container logs). Two nodes on one machine would meet there, and a crash would leave things
# behind. So nothing that a node mounts is ever visible outside, and the kernel takes all of it away with the
# last process.
set -euo pipefail
folder=$1
mkdir -p "$folder/var-lib" "$folder/var-log"
mount --bind "$folder/var-lib" /var/lib
mount --bind "$folder/var-log" /var/log
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/lock /var/lib/kubelet /var/lib/containerd /var/log/pods
# Volumes that kubelet mounts must appear in running containers (mountPropagation).
mount --bind /var/lib/kubelet /var/lib/kubelet
mount --make-rshared /var/lib/kubelet
# Pods with user namespaces walk through here as another user.
chmod 711 /var/lib/containerd
touch "$folder/ready"
exec sleep infinity
