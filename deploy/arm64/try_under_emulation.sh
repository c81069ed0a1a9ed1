#!/usr/bin/env bash
# Install onnxedge for 64-bit ARM and serve the five models there, emulated: as a Raspberry Pi 4 and as a Pi 5.
#
#   deploy/arm64/try_under_emulation.sh              in a checkout where `make models` has run; as root; 3 minutes
#
# Prints what `onnxedge providers` finds and, for each model, how far its answers are from this machine's and from
# PyTorch's. Ends with 1 where one is further off than the export allows. Leaves nothing behind.
# Needs mmdebstrap and an apt that reaches Debian. PYTHON: with onnxedge's dev group (default: .venv/bin/python).
# MODELS: a repository to serve instead of one exported for arm64 from runs/quick. SUITE, MIRROR: see make_root.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
limit=2400 # seconds; each of the parts has a limit of its own, too

if [[ ${BOUNDED:-} != yes ]]; then
  BOUNDED=yes exec timeout --kill-after=90 "$limit" "$0" "$@"
fi
for tool in mmdebstrap unshare dpkg-deb "$python"; do
  command -v "$tool" > /dev/null || { echo "try_under_emulation.sh: $tool is not there" >&2; exit 1; }
done
[[ $(id -u) == 0 ]] || { echo "try_under_emulation.sh: mounts and chroot need root" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 143' INT TERM

echo "== onnxedge's wheel"
"$python" -m hatchling build -t wheel -d "$work/wheel" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }

if [[ -n ${MODELS:-} ]]; then
  cp -r "$MODELS" "$work/models"
else
  for name in mobilenet resnet lstm gpt bert; do
    echo "== exporting $name for arm64"
    "$python" -m export "runs/quick/$name" --to "$work/models" --target arm64 > "$work/log" 2>&1 \
      || { cat "$work/log"; exit 1; }
  done
fi

echo "== an arm64 Debian with the wheels of constraints.txt"
deploy/arm64/make_root.sh "$work/root" "$(echo "$work"/wheel/*.whl)[images,text]"

status=0
for board in 'cortex-a72 Raspberry Pi 4 Model B' 'cortex-a76 Raspberry Pi 5 Model B'; do
  cpu=${board%% *} name=${board#* }
  echo
  echo "== $name ($cpu)"
  timeout 120 deploy/arm64/in_root.sh "$work/root" "$cpu" "$name" -m serve providers
  timeout 1000 "$python" deploy/arm64/compare.py --root "$work/root" --models "$work/models" \
    --cpu "$cpu" --board "$name" || status=1
done
exit "$status"
