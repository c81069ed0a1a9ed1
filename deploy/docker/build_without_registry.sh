#!/usr/bin/env bash
# Build the unchanged Dockerfile where no image registry can be reached, and try the image:
#   sudo deploy/docker/build_without_registry.sh             builds, starts, asks, stops; three minutes on two idle cores
#   sudo deploy/docker/build_without_registry.sh COMMAND...  runs COMMAND with that engine, in place of the tests
# It needs Debian with its package mirror and Python's index, as apt and pip are set up here, root, and 3 GB. A private
# Docker Engine (Debian's packages, unpacked, not installed) runs in a folder that is removed at the end, with
# everything that was started. Base images are made of Debian's packages and carry the real ones' names, so what
# this shows of sizes is about what we add to them.
set -euo pipefail
cd "$(dirname "$0")/../.."

LIMIT_SECONDS=${LIMIT_SECONDS:-1500}
if [[ -z ${BOUNDED-} ]]; then
  BOUNDED=1 exec timeout --kill-after=60 "$LIMIT_SECONDS" "$0" "$@"
fi

ENGINE_SUITE=trixie # bookworm's Docker has no BuildKit front end of its own and no compose
PYTHON=${PYTHON:-.venv/bin/python}
VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' serve/__init__.py)
BASE=$(sed -n 's/^ARG BASE=//p' deploy/docker/Dockerfile)
PROMETHEUS=$(sed -n 's/^ *image: \(prom\/.*\)/\1/p' deploy/compose/compose.yaml)
KEPT=$PWD/build/deploy # packages and base images, for the next run
WORK=$(mktemp -d "${TMPDIR:-/tmp}/onnxedge-engine.XXXXXX")
SECONDS=0

say() { printf '== %3d s  %s\n' "$SECONDS" "$*"; }

stop_engine() {
  local pid
  set +e
  pid=$(cat "$WORK/docker.pid" 2>/dev/null)
  if [[ -n $pid ]]; then
    docker ps --quiet --all | xargs --no-run-if-empty docker rm --force >/dev/null
    docker network prune --force >/dev/null
    kill "$pid"
    timeout 30 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"
  fi
  mount | awk -v folder="$WORK/" 'index($3, folder) == 1 { print $3 }' | sort -r | xargs --no-run-if-empty umount
  rm -rf "$WORK"
}
trap stop_engine EXIT

unpack_engine() { # into $KEPT/engine, once
  [[ -e $KEPT/engine/complete ]] && return
  say "unpacking Docker Engine from Debian $ENGINE_SUITE's packages"
  local apt=$WORK/apt mirror
  # shellcheck disable=SC2016 # apt's own variable
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
  mkdir -p "$apt/lists/partial" "$apt/parts" "$apt/archives/partial" "$KEPT/engine"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $ENGINE_SUITE main" >"$apt/sources.list"
  local options=(-qq -o "APT::Sandbox::User=root" -o "Dir::Etc::SourceList=$apt/sources.list"
    -o "Dir::Etc::SourceParts=$apt/parts" -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt"
    -o "Dir::State::Status=/dev/null")
  apt-get "${options[@]}" update
  (
    cd "$WORK"
    apt-get "${options[@]}" download docker.io docker-cli docker-compose docker-buildx containerd tini prometheus
    # This release's own, which must fit its C library. iptables is for the names of services, which Docker answers
    # by a rule inside each container.
    apt-get -qq -o APT::Sandbox::User=root download runc iptables libxtables12 libip4tc2 libip6tc2 libnftnl11 libmnl0
    for package in ./*.deb; do dpkg -x "$package" "$KEPT/engine"; done
    rm ./*.deb
  )
  local libraries
  libraries=$(dirname "$KEPT"/engine/usr/lib/*/xtables)
  printf '%s\n' '#!/bin/sh' "LD_LIBRARY_PATH=$libraries XTABLES_LIBDIR=$libraries/xtables" \
    "export LD_LIBRARY_PATH XTABLES_LIBDIR" "exec $KEPT/engine/usr/sbin/xtables-nft-multi iptables \"\$@\"" \
    >"$KEPT/engine/usr/sbin/iptables"
  chmod +x "$KEPT/engine/usr/sbin/iptables"
  touch "$KEPT/engine/complete"
}

start_engine() {
  export PATH=$KEPT/engine/usr/sbin:$KEPT/engine/usr/bin:$PATH
  export DOCKER_HOST=unix://$WORK/docker.sock DOCKER_CONFIG=$WORK/configuration
  mkdir -p "$DOCKER_CONFIG"
  ln -s "$KEPT/engine/usr/libexec/docker/cli-plugins" "$DOCKER_CONFIG/cli-plugins"
  # Neither the machine's firewall nor its bridges are touched: published ports go through docker-proxy.
  dockerd --host "$DOCKER_HOST" --pidfile "$WORK/docker.pid" --data-root "$WORK/data" --exec-root "$WORK/exec" \
    --iptables=false --ip6tables=false --bridge=none --storage-driver overlay2 >"$WORK/dockerd.log" 2>&1 &
  for ((i = 0; i < 150; i++)); do
    docker version >/dev/null 2>&1 && return
    sleep 0.2
  done
  tail "$WORK/dockerd.log" >&2
  return 1
}

import_base() { # the stand-in for Docker's Python image, with this machine's way to the package index
  local tar=$KEPT/base.tar
  if [[ ! -e $tar ]]; then
    say "making the base image of Debian bookworm's packages"
    local hooks=("--customize-hook=copy-in /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs")
    [[ -e /etc/pip.conf ]] && hooks+=("--customize-hook=copy-in /etc/pip.conf /etc")
    mmdebstrap --quiet --format=tar --variant=minbase --include=python3,python3-venv,ca-certificates "${hooks[@]}" \
      bookworm "$tar.part"
    mv "$tar.part" "$tar"
  fi
  docker import - "$BASE" <"$tar" >/dev/null
}

build_prometheus() { # Debian's, where the real image has its own: an older release that takes the same flags
  mkdir "$WORK/prometheus"
  cp "$KEPT/engine/usr/bin/prometheus" "$WORK/prometheus/"
  printf '%s\n' "FROM $BASE" 'COPY prometheus /bin/prometheus' \
    'RUN printf "#!/usr/bin/python3\nimport sys, urllib.request\nurllib.request.urlopen(sys.argv[-1])\n" >/bin/wget \
      && chmod +x /bin/wget && mkdir /prometheus && chown 65534:65534 /prometheus' \
    'USER 65534' 'ENTRYPOINT ["/bin/prometheus"]' >"$WORK/prometheus/Dockerfile"
  docker build --quiet --network none -t "$PROMETHEUS" "$WORK/prometheus" >/dev/null
}

command -v mmdebstrap >/dev/null || apt-get -qq install -y --no-install-recommends mmdebstrap
mkdir -p "$KEPT"
unpack_engine
start_engine
say "Docker Engine $(docker version --format '{{.Server.Version}}') runs"
import_base
say "building onnxedge:$VERSION"
docker build --quiet --network host -f deploy/docker/Dockerfile -t "onnxedge:$VERSION" .
build_prometheus
say "built"
if (($#)); then
  "$@"
else
  ONNXEDGE_DEPLOY_TESTS=1 "$PYTHON" -m pytest -s -q -p no:cacheprovider tests/deploy/test_container.py \
    tests/deploy/test_compose.py
fi
say "done; removing what was started"
