#!/usr/bin/env bash
# A folder with a Debian for arm64 that has onnxedge in it, and an emulator: what `pip install` puts on a board.
#
#   make_root.sh ROOT WHEEL...          25 s, 300 MB; ROOT must not be there yet
#
# Needs root, mmdebstrap, and an apt that reaches Debian. Nothing in ROOT runs while it is made.
# SUITE: which Debian (default: trixie, as Raspberry Pi OS). MIRROR: of Debian (default: apt's own).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$1
shift
suite=${SUITE:-trixie}
# shellcheck disable=SC2016 # apt's placeholders, not the shell's
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}
[[ -n $mirror ]] || { echo "make_root.sh: apt names no repository, set MIRROR to one of Debian's" >&2; exit 1; }
[[ ! -e $root ]] || { echo "make_root.sh: $root is there already, name a folder that is not" >&2; exit 1; }

mmdebstrap --quiet --arch=arm64 --variant=extract --include=base-files,python3,libstdc++6 "$suite" "$root" "$mirror"
python=$(basename "$(readlink -f "$root/usr/bin/python3")")

# Debian 12's emulator, 7.2, crashes in onnxruntime; trixie's is statically linked and runs anywhere.
apt=$root/opt/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
echo "deb $mirror trixie main" > "$apt/list"
options=(-qq -o "Dir::Etc::SourceList=$apt/list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update
(cd "$apt" && apt-get "${options[@]}" download qemu-user)
dpkg-deb --fsys-tarfile "$apt"/qemu-user_*.deb | tar --extract --directory "$root" ./usr/bin/qemu-aarch64
rm -r "$apt"

# The wheels that pip on a board would take; newer manylinux tags don't imply the older ones here.
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_aarch64")
done
python3 -m pip --disable-pip-version-check install -qq --no-warn-conflicts --root-user-action ignore \
  --target "$root/opt/onnxedge" "${platforms[@]}" --python-version "${python#python}" --implementation cp --only-binary=:all: \
  --constraint "$here/../../constraints.txt" "$@"
