"""Which RPC belongs to which of Triton's groups, and the header that a restricted group needs.

`--grpc-restricted-protocol=GROUP[,GROUP]:KEY=VALUE`, as Triton's protocol customization guide has it.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.rpc.servicer import SERVICE
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable

_FLAG = "--grpc-restricted-protocol"
_PREFIX = "triton-grpc-protocol-"
# What gRPC allows in the names of metadata; a name that ends with -bin would carry bytes.
_KEY = re.compile(r"[0-9a-z_.-]+(?<!-bin)")
_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")

_RPCS: dict[str, tuple[str, ...]] = {
    "health": ("ServerLive", "ServerReady", "ModelReady"),
    "metadata": ("ServerMetadata", "ModelMetadata"),
    "inference": ("ModelInfer", "ModelStreamInfer"),
    "shared-memory": tuple(
        f"{kind}SharedMemory{verb}"
        for kind in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    ),
    "model-config": ("ModelConfig",),
    "model-repository": ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
    "statistics": ("ModelStatistics",),
    "trace": ("TraceSetting",),
    "logging": ("LogSettings",),
}
GROUPS = tuple(_RPCS)
"""The groups, as Triton names them."""

GROUP_OF: dict[str, str] = {f"/{SERVICE}/{rpc}": group for group, rpcs in _RPCS.items() for rpc in rpcs}
"""A method's full name to its group."""
HEALTH_METHODS = tuple(f"/grpc.health.v1.Health/{method}" for method in ("Check", "Watch", "List"))
GROUP_OF |= dict.fromkeys(HEALTH_METHODS, "health")
GROUP_OF |= {
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo": "metadata"
    for version in ("v1", "v1alpha")
}


@dataclass(frozen=True, slots=True)
class Restriction:
    """The header, in lower case, and the value that a group's RPCs need."""

    header: str
    value: bytes

    def met_by(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a request's metadata has the header with this value; takes as long for each wrong one."""
        return any(
            hmac.compare_digest(value.encode() if isinstance(value, str) else value, self.value)
            for name, value in metadata
            if name == self.header
        )


def parse_restrictions(options: Iterable[str]) -> dict[str, Restriction]:
    """Each restricted group's header.

    Raises:
        SettingsError: an option is not GROUP[,GROUP]:KEY=VALUE, names no group of Triton's, or one again. The
            message leaves the value out, which is a secret.
    """
    restrictions: dict[str, Restriction] = {}
    for option in options:
        names, colon, setting = option.partition(":")
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not (colon and equals and _KEY.fullmatch(key.lower()) and _VALUE.fullmatch(value)):
            raise SettingsError(
                f"{_FLAG} {names}:{key}{'=…' * bool(equals)}: expected GROUP[,GROUP]:KEY=VALUE, "
                "KEY of letters, digits and -_. and not ending with -bin, VALUE of ASCII"
            )
        for name in (part.strip() for part in names.split(",")):
            if name not in GROUPS:
                raise SettingsError(f"{_FLAG}: unknown group {name!r}, expected one of {', '.join(GROUPS)}")
            if name in restrictions:
                raise SettingsError(f"{_FLAG}: group '{name}' is named twice, it can have one key")
            restrictions[name] = Restriction(_PREFIX + key.lower(), value.encode())
    return restrictions
