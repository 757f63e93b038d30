# The cgroup subtree of the cluster, for cgroup v1 (also beside v2) and v2: making and removing it. Sourced.

cgroup_version() { if [ -f /sys/fs/cgroup/cgroup.controllers ]; then echo 2; else echo 1; fi; }

# The mount points of all cgroup hierarchies that the kernel shows us (v2 has exactly one).
cgroup_hierarchies() {
  awk '{ for (i = 7; i <= NF; i++) if ($i == "-") { if ($(i + 1) ~ /^cgroup2?$/) print $5; next } }' /proc/self/mountinfo | sort -u
}

# make_cgroup NODE: the subtree that is this node's cgroupRoot; kubelet puts pods below it.
make_cgroup() {
  local node=$1 root folder controllers
  if [ "$(cgroup_version)" = 2 ]; then
    mkdir -p "/sys/fs/cgroup/$CGROUP/$node" "/sys/fs/cgroup/$CGROUP/system" "/sys/fs/cgroup/$CGROUP/clients"
    # A v2 controller exists in a group only if every ancestor hands it down. "system" and "clients" are
    # leaves, as the rule "no processes in inner groups" wants it.
    for folder in /sys/fs/cgroup "/sys/fs/cgroup/$CGROUP" "/sys/fs/cgroup/$CGROUP/$node"; do
      read -ra controllers <"$folder/cgroup.controllers" || true
      for root in "${controllers[@]}"; do
        echo "+$root" >"$folder/cgroup.subtree_control" 2>/dev/null || true
      done
    done
    return
  fi
  mkdir -p "$(tracking_root)/system" "$(tracking_root)/clients"
  for root in $(cgroup_hierarchies); do
    mkdir -p "$root/$CGROUP/$node"
    # A new v1 cpuset is empty, and an empty one takes no process.
    for folder in "$root/$CGROUP" "$root/$CGROUP/$node"; do
      if [ -f "$folder/cpuset.cpus" ]; then
        cat "$root/cpuset.cpus" >"$folder/cpuset.cpus"
        cat "$root/cpuset.mems" >"$folder/cpuset.mems"
      fi
    done
  done
}

our_cgroups() {
  local root
  for root in $(cgroup_hierarchies); do [ -d "$root/$CGROUP" ] && find "$root/$CGROUP" -type d; done
  return 0
}

# Deepest first; a group can be removed only a moment after its last process is gone.
remove_cgroups() {
  local folder
  for _ in $(seq 50); do
    our_cgroups | sort -r | while read -r folder; do rmdir "$folder" 2>/dev/null || true; done
    [ -n "$(our_cgroups)" ] || return 0
    sleep 0.1
  done
}
