#!/usr/bin/env bash
# A fresh Debian with only Python: do the commands of docs/deploy/raspberry-pi.md bring the service up, does it
# answer, come up again after a crash and after a reboot, and drain when it is stopped?
#
#   deploy/systemd/try_on_debian.sh          in a checkout where `make models` has run; as root; 2 minutes
#
# The commands are taken from that page, from its block after "## Install", and typed into a Debian that systemd
# has booted in a container without a network. pip's packages lie beside it. Leaves nothing behind.
# Needs mmdebstrap, systemd-container, and an apt and a pip that reach their indexes.
# SUITE: which Debian (default: trixie). MIRROR: of Debian (default: apt's own). PYTHON: default .venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
suite=${SUITE:-trixie}
limit=900 # seconds

if [[ ${BOUNDED:-} != yes ]]; then
  BOUNDED=yes exec timeout --kill-after=90 "$limit" unshare --mount "$0" "$@"
fi
for tool in mmdebstrap systemd-nspawn nsenter "$python"; do
  command -v "$tool" > /dev/null || { echo "try_on_debian.sh: $tool is not there" >&2; exit 1; }
done
[[ $(id -u) == 0 ]] || { echo "try_on_debian.sh: containers need root" >&2; exit 1; }

work=$(mktemp -d)
group=onnxedge-try-$$
nspawn=
clean_up() {
  if [[ -n $nspawn ]]; then
    echo 1 > "/sys/fs/cgroup/$group/cgroup.kill"
    wait "$nspawn" 2> /dev/null || true
    for _ in 1 2 3 4 5 6 7 8 9; do # what was killed leaves a moment later
      find "/sys/fs/cgroup/$group" -depth -type d -exec rmdir {} + 2> /dev/null && break
      sleep 0.2
    done
  fi
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 143' INT TERM

echo "== onnxedge's wheel, Debian $suite"
"$python" -m hatchling build -t wheel -d "$work/wheel" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
# shellcheck disable=SC2016 # apt's placeholders, not the shell's
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}
root=$work/root
mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,systemd-sysv,dbus,procps \
  "$suite" "$root" "$mirror"
version=$(basename "$(readlink -f "$root/usr/bin/python3")")
home=$root/root
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_$(uname -m)")
done
"$python" -m pip --disable-pip-version-check download -qq --dest "$home/packages" "${platforms[@]}" \
  --python-version "${version#python}" --implementation cp --only-binary=:all: \
  --constraint constraints.txt "$(echo "$work"/wheel/*.whl)[images,text]"
cp -r "$work"/wheel/*.whl constraints.txt deploy/systemd/onnxedge.{service,env} tests/data/boot.png "$home"
cp -r "${MODELS:-models}" "$home/models"

# The page's block after its heading, with the part before "systemctl" where an editor would be opened left out.
awk '/^## Install/ { here = 1 } here && /^```$/ { exit } here && block { print } here && /^```sh$/ { block = 1 }' \
  docs/deploy/raspberry-pi.md > "$home/commands"
[[ -s $home/commands ]] || { echo "try_on_debian.sh: no commands in docs/deploy/raspberry-pi.md" >&2; exit 1; }
printf '#!/bin/sh\nexec "$@"\n' > "$root/usr/bin/sudo" # it is root who types
chmod +x "$root/usr/bin/sudo"

# Cgroups of the container's own, in version 2 whatever this machine has mounted, one for each boot.
mount --make-rprivate /
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
boots() {
  local status=133 number
  for number in 1 2; do
    [[ $status == 133 ]] || break # what nspawn ends with when the container asks for a reboot
    mkdir -p "/sys/fs/cgroup/$group/$number"
    echo "$BASHPID" > "/sys/fs/cgroup/$group/$number/cgroup.procs"
    status=0
    systemd-nspawn --quiet --directory="$root" --machine="$group" --boot --register=no --keep-unit \
      --private-network --console=pipe > "$work/console" 2>&1 < /dev/null || status=$?
  done
}
boots &
nspawn=$!

inside() { # run a command in the container
  local leader
  leader=$(cat "/sys/fs/cgroup/$group"/*/payload/init.scope/cgroup.procs 2> /dev/null)
  nsenter --target "${leader:-none}" --mount --uts --ipc --net --pid --cgroup --wdns=/root env -i HOME=/root \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin PIP_NO_INDEX=1 PIP_FIND_LINKS=packages "$@"
}
until_it_works() { # seconds, command...: try each half second
  local end=$((SECONDS + $1))
  shift
  until "$@" > "$work/log" 2>&1; do
    ((SECONDS < end)) || { echo "not in time: $*"; cat "$work/log"; inside journalctl -u onnxedge | tail -n 30; exit 1; }
    sleep 0.5
  done
}
ask=(inside /opt/onnxedge/bin/onnxedge infer mobilenet --image boot.png --top 1)
state() { inside systemctl show onnxedge --property "$1" --value; }

until_it_works 60 inside systemctl is-active multi-user.target
echo "== booted: $(inside systemctl --version | head -n 1), $(inside python3 --version), no network"
echo "== the page's commands"
cat "$home/commands"
inside bash -euo pipefail commands > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
until_it_works 60 "${ask[@]}"
echo "== it answers: $("${ask[@]}" | xargs)"
inside systemctl status onnxedge --no-pager --lines 2
inside systemd-analyze verify /etc/systemd/system/onnxedge.service && echo "== systemd-analyze verify: nothing to say"
inside systemd-analyze security --no-pager onnxedge | tail -n 1

echo "== the process: $(inside ps -o user:8,rss,nlwp,args --no-headers -p "$(state MainPID)") (user, KiB, threads)"
before=$(state MainPID)
inside kill -KILL "$before"
until_it_works 60 "${ask[@]}"
echo "== killed, and it answers again (process $before, now $(state MainPID); $(state NRestarts) restart)"

token=0123456789abcdef
inside mkdir -p /etc/systemd/system/onnxedge.service.d
echo "$token" > "$root/etc/onnxedge/tokens"
chmod 600 "$root/etc/onnxedge/tokens"
# The page's lines about tokens.
awk '/LoadCredential/ { here = 1; print "[Service]" } here && /```/ { exit } here { print }' \
  docs/deploy/raspberry-pi.md | sed 's/^ *//' > "$root/etc/systemd/system/onnxedge.service.d/tokens.conf"
inside systemctl daemon-reload
inside systemctl restart onnxedge
until_it_works 60 "${ask[@]}" --header "authorization: Bearer $token"
"${ask[@]}" > "$work/log" 2>&1 && { echo "it answers without a token"; exit 1; }
echo "== with the page's lines for tokens: $(< "$work/log")"
rm -r "$root/etc/systemd/system/onnxedge.service.d"
inside systemctl daemon-reload
inside systemctl restart onnxedge
until_it_works 60 "${ask[@]}"

inside systemctl stop onnxedge
echo "== stopped: result $(state Result), status $(state ExecMainStatus)"
[[ $(state Result) == success && $(state ExecMainStatus) == 0 ]]

boot=$(inside ps -o lstart= -p 1)
inside systemctl reboot || true
sleep 2
until_it_works 60 inside systemctl is-active multi-user.target
until_it_works 60 "${ask[@]}"
echo "== rebooted, and it answers: $("${ask[@]}" | xargs) (booted $boot, now $(inside ps -o lstart= -p 1))"
[[ $boot != "$(inside ps -o lstart= -p 1)" ]]
echo "== all of it held"
