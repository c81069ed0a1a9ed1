"""Test hosts on one machine: network namespaces on a bridge, which end with the process that made them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Namespaces of networks, mounts (`ip netns` keeps names in one) and processes: when the first process in them
# ends, however it ends, the kernel ends the others and takes the hosts away.
# A file system of their own for their names, which would stay behind on the machine's.
_NAMES = "mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns"
_ISOLATED = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_LONGEST_SECONDS = 900
_INSIDE = "ONNXEDGE_TEST_HOSTS"
# An address range that is nobody's (RFC 5737), and is only known inside.
_NETWORK = "192.0.2"


@dataclass(frozen=True)
class Host:
    """Where a program of a test runs: `command` before its own, and the address that it listens at."""

    address: str
    command: tuple[str, ...] = ()


def why_not() -> str:
    """Why this machine can't have hosts of its own; empty if it can."""
    try:
        tried = subprocess.run(
            [*_ISOLATED, "sh", "-c", f"{_NAMES} && ip netns add probe && ip link add lan type bridge"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except OSError as error:
        return str(error)
    return "" if tried.returncode == 0 else tried.stderr.strip().splitlines()[-1]


def isolated() -> bool:
    """Whether this is the process that `run_isolated` started."""
    return _INSIDE in os.environ


def run_isolated(module: str, arguments: Sequence[str]) -> int | None:
    """Run `python -m MODULE ARGUMENTS` where `hosts` can make some; its exit status.

    None: this is that process, or there can be none.
    """
    if isolated() or why_not():
        return None
    command = [*_ISOLATED, sys.executable, "-m", module, *arguments]
    inside = {**os.environ, _INSIDE: "1"}
    try:
        return subprocess.run(command, env=inside, check=False, timeout=_LONGEST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped: not done after {_LONGEST_SECONDS} s", file=sys.stderr)
        return 1


def hosts(names: Sequence[str]) -> dict[str, Host]:
    """A host by each name, in a namespace of its own; without namespaces, addresses of the loopback."""
    if not isolated():
        return {name: Host(f"127.0.0.{number}") for number, name in enumerate(names, 2)}
    subprocess.run(["sh", "-c", _NAMES], check=True, timeout=30)  # noqa: S607 - iproute2 and its kin, where they are
    _ip("link set lo up")
    _ip("link add lan type bridge")
    _ip(f"address add {_NETWORK}.1/24 dev lan")
    _ip("link set lan up")
    return {name: _host(name, number) for number, name in enumerate(names, 2)}


def _host(name: str, number: int) -> Host:
    address = f"{_NETWORK}.{number}"
    _ip(f"netns add {name}")
    _ip(f"link add veth{number} type veth peer name eth0 netns {name}")
    _ip(f"link set veth{number} master lan up")
    _ip(f"-n {name} address add {address}/24 dev eth0")
    _ip(f"-n {name} link set eth0 up")
    _ip(f"-n {name} link set lo up")
    return Host(address, ("ip", "netns", "exec", name))


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, timeout=30)  # noqa: S607 - iproute2, where it is
