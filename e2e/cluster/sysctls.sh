# Kernel parameters of the machine that kubelet sets: they are saved before and restored after. Sourced.

KUBELET_SYSCTLS=(vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes)

save_sysctls() {
  [ -f "$STATE/sysctls" ] && return 0
  local name
  for name in "${KUBELET_SYSCTLS[@]}"; do echo "$name=$(sysctl -n "$name")"; done >"$STATE/sysctls.part"
  mv "$STATE/sysctls.part" "$STATE/sysctls"
}

restore_sysctls() {
  local line
  # After a reboot the kernel's own values are back already.
  [ -f "$STATE/sysctls" ] && [ "$(cat "$STATE/boot" 2>/dev/null)" = "$(cat /proc/sys/kernel/random/boot_id)" ] || return 0
  while read -r line; do sysctl -qw "$line" 2>/dev/null || true; done <"$STATE/sysctls"
}
