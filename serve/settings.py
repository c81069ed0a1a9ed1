"""`ServerSettings`: everything that the server can be told from outside, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve.model.encoded_image import DEFAULT_MAX_PIXELS

if TYPE_CHECKING:
    from pathlib import Path

_MAX_PORT = 65535

# Values that each of these may have; of the others only a least value is asked for.
_CHOICES = {
    "model_control_mode": ("none", "explicit", "poll"),
    "provider_policy": ("fallback", "strict"),
    "log_format": ("default", "ISO8601"),
    "grpc_infer_response_compression_level": ("none", "low", "medium", "high"),
}
_LEAST_VALUES = {
    "exit_timeout_secs": 0,
    "max_inflight_requests": 1,
    "max_inflight_bytes": 0,
    "max_request_bytes": 0,
    "max_metadata_bytes": 1024,
    "max_streams": 0,
    "max_live_sequences": 1,
    "max_image_pixels": 1,
    "repository_poll_secs": 1,
    "untrusted_memory_mb": 256,
    "untrusted_timeout_secs": 1,
    "grpc_keepalive_time": 1,
    "grpc_keepalive_timeout": 1,
    "grpc_http2_max_pings_without_data": 0,
    "grpc_http2_min_recv_ping_interval_without_data": 0,
    "grpc_http2_max_ping_strikes": 0,
    "grpc_max_connection_age": 0,
    "grpc_max_connection_age_grace": 0,
    "log_verbose": 0,
}


class SettingsError(ValueError):
    """A setting can't be used; the message names it."""


def flag_of(name: str) -> str:
    """A field's flag, without the dashes."""
    return "id" if name == "server_id" else name.replace("_", "-")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Each field is a flag, spelled as Triton's where Triton has it; its help text stands beside it.

    Raises:
        SettingsError: a value is out of its range.
    """

    server_id: str = _setting("onnxedge", "name in ServerMetadata (Triton's --id)")
    exit_timeout_secs: int = _setting(30, "seconds that requests in flight get to finish on SIGTERM")
    strict_readiness: bool = _setting(
        default=True, text="be ready only when every model is, instead of as soon as the server answers"
    )

    # Models
    model_repository: tuple[Path, ...] = _setting((), "folder of models; may be given more than once")
    model_control_mode: str = _setting(
        "none", "none: all models at the start; poll: follow the disk; explicit: load and unload by RPC"
    )
    load_model: tuple[str, ...] = _setting(
        (), "explicit mode: a model to load at the start, * for all; may be given more than once"
    )
    repository_poll_secs: int = _setting(15, "poll mode: seconds between two looks at the repository")
    exit_on_error: bool = _setting(
        default=False, text="exit when a model can't be loaded, instead of serving the others"
    )
    disable_auto_complete_config: bool = _setting(
        default=False, text="take each config.pbtxt as it is: what it leaves out is not completed"
    )
    backend_config: tuple[str, ...] = _setting(
        (), "onnxruntime,NAME=VALUE: a default for every model; may be given more than once"
    )
    provider_policy: str = _setting(
        "fallback", "strict: refuse a model that can't run wholly on the provider that it wants"
    )
    untrusted_repository: bool = _setting(
        default=False, text="load and run every graph in a throw-away process first"
    )
    untrusted_memory_mb: int = _setting(2048, "memory that this process may take")
    untrusted_timeout_secs: int = _setting(60, "time that this process may take")

    # Bounds
    max_inflight_requests: int = _setting(
        128, "requests in the server at once, running and waiting; past that they get UNAVAILABLE at once"
    )
    max_inflight_bytes: int = _setting(
        0, "bytes of the requests in the server at once; 0: an eighth of the memory that it may use"
    )
    max_request_bytes: int = _setting(
        0, "largest request; 0: the largest batch that a model declares and 1 MiB, 64 MiB at least"
    )
    max_metadata_bytes: int = _setting(16384, "largest metadata (headers) of a request")
    max_streams: int = _setting(64, "ModelStreamInfer streams open at once")
    max_live_sequences: int = _setting(4096, "sequences of one model alive at once")
    max_image_pixels: int = _setting(
        DEFAULT_MAX_PIXELS, "largest image that is decoded for models that take image files"
    )

    # The gRPC endpoint
    grpc_address: str = _setting("0.0.0.0", "address the gRPC endpoint binds to")  # noqa: S104 - as Triton's
    grpc_port: int = _setting(8001, "port of the gRPC endpoint; 0 takes a free one")
    reuse_grpc_port: bool = _setting(
        default=False, text="let several servers listen on the same port, for handing over without a gap"
    )
    grpc_infer_response_compression_level: str = _setting("none", "none, low, medium or high")
    grpc_keepalive_time: int = _setting(7_200_000, "milliseconds between keepalive pings")
    grpc_keepalive_timeout: int = _setting(20_000, "milliseconds that a ping's answer may take")
    grpc_keepalive_permit_without_calls: bool = _setting(default=False, text="ping idle connections, too")
    grpc_http2_max_pings_without_data: int = _setting(2, "pings sent without data between them")
    grpc_http2_min_recv_ping_interval_without_data: int = _setting(
        300_000, "milliseconds that a client must leave between pings"
    )
    grpc_http2_max_ping_strikes: int = _setting(2, "pings too early before a client is cut off; 0: any")
    grpc_max_connection_age: int = _setting(0, "milliseconds after which a connection is closed; 0: never")
    grpc_max_connection_age_grace: int = _setting(0, "milliseconds that its calls get then; 0: any")

    # Who may ask
    grpc_use_ssl: bool = _setting(default=False, text="TLS")
    grpc_use_ssl_mutual: bool = _setting(default=False, text="TLS, and clients must have a certificate")
    grpc_server_cert: str = _setting("", "file of the server's certificate chain, PEM; may change")
    grpc_server_key: str = _setting("", "file of the server's private key, PEM; may change")
    grpc_root_cert: str = _setting("", "file of the certificates that clients' must come from, PEM")
    auth_token_file: str = _setting(
        "", "file of bearer tokens, one a line; a request without one of them is refused"
    )
    auth_health: bool = _setting(
        default=True, text="grpc.health.v1 needs a token, too; false for probes and balancers that have none"
    )
    grpc_restricted_protocol: tuple[str, ...] = _setting(
        (), "GROUP[,GROUP]:KEY=VALUE: these groups of RPCs need this header; may be given more than once"
    )
    allow_client_shm: bool = _setting(default=False, text="let clients register system shared memory")
    client_shm_prefix: str = _setting("/onnxedge", "what the names of their regions must begin with")

    # Metrics, logs, traces
    allow_metrics: bool = _setting(default=True, text="serve Prometheus metrics")
    metrics_address: str = _setting("0.0.0.0", "address the metrics endpoint binds to")  # noqa: S104 - as Triton's
    metrics_port: int = _setting(8002, "port of the metrics endpoint; 0 takes a free one")
    log_info: bool = _setting(default=True, text="log what happens")
    log_warning: bool = _setting(default=True, text="log warnings")
    log_error: bool = _setting(default=True, text="log errors")
    log_verbose: int = _setting(0, "1 logs every failed request")
    log_format: str = _setting("default", "default or ISO8601")
    log_file: str = _setting("", "file for the log instead of stderr")
    access_log: str = _setting("", "file for a JSON line per request; - is stderr")
    trace_config: tuple[str, ...] = _setting(
        (), "[triton|opentelemetry,]NAME=VALUE, such as rate=100 or triton,file=trace.json"
    )

    def __post_init__(self) -> None:
        """Check the ranges, and that what belongs together is there."""
        self._check_values()
        if self.load_model and self.model_control_mode != "explicit":
            raise SettingsError("--load-model needs --model-control-mode=explicit, others load all models")
        if self.allow_metrics and self.grpc_port == self.metrics_port != 0:
            raise SettingsError(
                f"--grpc-port and --metrics-port are both {self.grpc_port}, expected two ports"
            )
        if not self.model_repository:
            raise SettingsError("--model-repository is missing: name the folder that holds the models")
        for folder in self.model_repository:
            if not folder.is_dir():
                raise SettingsError(f"--model-repository {folder} is not a folder")
            if not os.access(folder, os.R_OK | os.X_OK):
                raise SettingsError(
                    f"--model-repository {folder} can't be read by user {os.getuid()}: chmod -R a+rX it"
                )

    def _check_values(self) -> None:
        for name in ("grpc_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= _MAX_PORT:
                raise SettingsError(f"--{flag_of(name)} is {getattr(self, name)}, expected 0 to {_MAX_PORT}")
        for name, least in _LEAST_VALUES.items():
            if getattr(self, name) < least:
                raise SettingsError(f"--{flag_of(name)} is {getattr(self, name)}, expected {least} or more")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"--{flag_of(name)} is {getattr(self, name)!r}, expected {' or '.join(choices)}"
                )
