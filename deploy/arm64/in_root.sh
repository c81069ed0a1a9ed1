#!/usr/bin/env bash
# Run Python in a root of make_root.sh, emulated.
#
#   in_root.sh ROOT CPU BOARD python-arguments...     in_root.sh arm64 cortex-a76 'Raspberry Pi 5' -m serve providers
#
# CPU: one of qemu's, such as cortex-a72 (Raspberry Pi 4) or cortex-a76 (5). BOARD: the name that the kernel would
# have from the device tree; empty for none. FOLDER in the environment is seen as /srv/models.
# The process becomes the emulator, so a signal to it reaches the program; its mounts are gone when it ends.
set -euo pipefail
if [[ ${1:-} != --mounted ]]; then
  exec unshare --mount "$0" --mounted "$@"
fi
root=$2 cpu=$3 board=$4
shift 4
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/srv/models"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/sys/firmware"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
if [[ -n $board ]]; then
  mkdir -p "$root/sys/firmware/devicetree/base"
  printf '%s\0' "$board" > "$root/sys/firmware/devicetree/base/model"
fi
if [[ -n ${FOLDER:-} ]]; then
  mount --bind -o ro "$FOLDER" "$root/srv/models"
fi
exec env -i HOME=/nonexistent PATH=/usr/bin:/usr/sbin PYTHONPATH=/opt/onnxedge PYTHONDONTWRITEBYTECODE=1 \
  LANG=C.UTF-8 QEMU_CPU="$cpu" chroot "$root" /usr/bin/qemu-aarch64 /usr/bin/python3 "$@"
