# Everything of the cluster outside its own folder: finding, removing and counting it. Sourced.

# Mounts that this machine can see below our folder (octal escapes for blanks are undone by printf).
our_mounts() { awk -v prefix="$STATE/" 'index($5, prefix) == 1 { print $5 }' /proc/self/mountinfo | sort -r; }

thaw() {
  local file
  # A process in a frozen v1 group never ends, even when it is killed.
  find "/sys/fs/cgroup/freezer/$CGROUP" -name freezer.state 2>/dev/null | while read -r file; do echo THAWED >"$file" 2>/dev/null || true; done
}

remove_leftovers() {
  local mount
  thaw
  kill_remaining
  for mount in $(our_mounts); do umount -l "$mount" || true; done
  remove_cgroups
  lan_down
  restore_sysctls
  # One file system only: if a mount could not be removed, nothing behind it is deleted.
  rm -rf --one-file-system "$STATE"
}

count_leftovers() {
  local processes mounts cgroups namespaces links files
  processes=$(our_processes | wc -l)
  mounts=$(our_mounts | wc -l)
  cgroups=$(our_cgroups | wc -l)
  namespaces=$(our_namespaces | wc -l)
  links=$(ip -o link show dev "$HOST_LINK" 2>/dev/null | wc -l)
  files=$([ -e "$STATE" ] && echo 1 || echo 0)
  echo "$processes processes, $mounts mounts, $cgroups cgroups, $namespaces namespaces, $links network links, $files state folders"
  [ $((processes + mounts + cgroups + namespaces + links + files)) = 0 ]
}
