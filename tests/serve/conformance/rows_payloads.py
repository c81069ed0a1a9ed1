"""§8: what answers hold."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from tests.serve.conformance.servers import DEADLINE, eventually, floats, status, tensor
from tests.serve.conformance.table import NO_BACKEND, SAME, Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"
NO_EFFECT = "differs: OK, without effect"

EXTENSIONS = [
    "binary_tensor_data", "classification", "cuda_shared_memory", "logging", "model_configuration",
    "model_repository", "model_repository(unload_dependents)", "parameters", "schedule_policy", "sequence",
    "statistics", "system_shared_memory", "trace",
]  # fmt: skip


@row("8", "sync", "server metadata: the extensions", fact=EXTENSIONS)
def _(servers: Servers) -> Any:
    return sorted(servers.client.get_server_metadata().extensions)


@row("8", "sync", "live and ready", fact=(True, True))
def _(servers: Servers) -> Any:
    return servers.client.is_server_live(), servers.client.is_server_ready()


@row("8", "sync", "platform and backend of an ONNX model",
     fact=("onnxruntime_onnx", "onnxruntime_onnx", "onnxruntime", "model.onnx"),
     triton=NO_BACKEND)  # fmt: skip
def _(servers: Servers) -> Any:
    config = servers.client.get_model_config("fixed").config
    platform = servers.client.get_model_metadata("fixed").platform
    return platform, config.platform, config.backend, config.default_model_filename


@row("8", "sync", "model config: datatypes, dims, policy, instances",
     fact=(4, [("a", 11, [3]), ("b", 11, [3])], 1, True))  # fmt: skip
def _(servers: Servers) -> Any:
    config = servers.client.get_model_config("batched").config
    inputs = [(each.name, each.data_type, list(each.dims)) for each in config.input]
    policy = config.version_policy.latest.num_versions
    return config.max_batch_size, inputs, policy, all(group.count > 0 for group in config.instance_group)


@row("8", "sync", "model metadata: name, version, tensors in order",
     fact=("batched", ["1"], [("a", "FP32"), ("b", "FP32")], ["sum", "difference"]))  # fmt: skip
def _(servers: Servers) -> Any:
    metadata = servers.client.get_model_metadata("batched")
    inputs = [(each.name, each.datatype) for each in metadata.inputs]
    return metadata.name, list(metadata.versions), inputs, [each.name for each in metadata.outputs]


@row("8", "sync", "repository index of a server that loads all it finds", fact=["10", "2", "9"])
def _(servers: Servers) -> Any:
    models = servers.client.get_model_repository_index().models
    return sorted(found.version for found in models if found.name == "all" and found.state == "READY")


# Statistics of a model that only these rows use.


def counted(servers: Servers, rows: int, size: int = 3) -> Any:
    return servers.infer("counted", *(floats(name, np.ones((rows, size))) for name in "ab"))


def statistics(servers: Servers, name: str = "counted") -> Any:
    return servers.client.get_inference_statistics(name).model_stats[0]


@row("8", "sync", "statistics: requests, rows and runs are counted apart; a row per batch size",
     fact=(8, 5, 5, {1: 3, 2: 1, 3: 1}))  # fmt: skip
def _(servers: Servers) -> Any:
    for rows in (1, 1, 2, 1, 3):
        counted(servers, rows)
    # The last run may be counted after its answer is sent.
    eventually(lambda: statistics(servers).execution_count >= 5)
    found = statistics(servers)
    batches = {each.batch_size: each.compute_infer.count for each in found.batch_stats}
    return found.inference_count, found.execution_count, found.inference_stats.success.count, batches


@row("8", "sync", "statistics: a run that fails is a failure", fact=("INTERNAL", 1))
def _(servers: Servers) -> Any:
    def failures() -> int:
        return int(statistics(servers, "gather").inference_stats.fail.count)

    before = failures()
    code = status(lambda: servers.infer("gather", tensor("x", np.array([9]), "INT64")))
    eventually(lambda: failures() > before)
    return code, failures() - before


@row("8", "sync", "statistics: a request that is wrong is a failure", fact=(INVALID, 5, 1),
     triton="differs: counts no request that it refuses before it queues it")  # fmt: skip
def _(servers: Servers) -> Any:
    code = status(lambda: counted(servers, 1, 9))
    found = statistics(servers).inference_stats
    return code, found.success.count, found.fail.count


@row("8", "sync", "statistics: queue and compute are in success, in nanoseconds", fact=(True, [5] * 4))
def _(servers: Servers) -> Any:
    found = statistics(servers).inference_stats
    parts = [found.queue, found.compute_input, found.compute_infer, found.compute_output]
    return 0 < sum(part.ns for part in parts) <= found.success.ns, [part.count for part in parts]


@row("8", "sync", "statistics: last_inference is in milliseconds since 1970", fact=True)
def _(servers: Servers) -> Any:
    before = time.time() * 1000 - 1
    counted(servers, 1)
    eventually(lambda: statistics(servers).last_inference >= before)
    return bool(statistics(servers).last_inference <= time.time() * 1000 + 1)


@row("8", "sync", "statistics: each version has its own", fact=(["10", "2", "9"], ["9"]))
def _(servers: Servers) -> Any:
    every = servers.client.get_inference_statistics("all").model_stats
    one = servers.client.get_inference_statistics("all", "9").model_stats
    return sorted(found.version for found in every), [found.version for found in one]


@row("8", "sync", "statistics of all models", fact=True)
def _(servers: Servers) -> Any:
    found = {each.name for each in servers.client.get_inference_statistics().model_stats}
    return {"all", "batched", "sum", "slow"} <= found


# Trace and log settings

TRACE = ["log_frequency", "trace_count", "trace_file", "trace_level", "trace_mode", "trace_rate"]


@row("8", "sync", "trace settings: the keys", fact=TRACE)
def _(servers: Servers) -> Any:
    return sorted(servers.client.get_trace_settings().settings)


@row("8", "sync", "trace settings: off by default", fact=["OFF"])
def _(servers: Servers) -> Any:
    return list(servers.client.get_trace_settings().settings["trace_level"].value)


@row("8", "sync", "trace settings: a model's own, until they are cleared", fact=(["7"], ["1000"], ["1000"]))
def _(servers: Servers) -> Any:
    def rate(model: str) -> list[str]:
        return list(servers.client.get_trace_settings(model).settings["trace_rate"].value)

    servers.client.update_trace_settings("fixed", {"trace_rate": "7"})
    own, others = rate("fixed"), rate("batched")
    servers.client.update_trace_settings("fixed", {"trace_rate": None})
    return own, others, rate("fixed")


TRACES = (
    ("an unknown key", {"trace_mine": "1"}, INVALID, NO_EFFECT),
    ("an unknown level", {"trace_level": ["MAX"]}, INVALID, NO_EFFECT),
    ("a rate that is no number", {"trace_rate": "x"}, INVALID, SAME),
    ("two rates", {"trace_rate": ["1", "2"]}, INVALID, SAME),
    ("a count that is no number", {"trace_count": "x"}, INVALID, SAME),
    ("a frequency that is no number", {"log_frequency": "x"}, INVALID, SAME),
    ("another file, which no client may choose", {"trace_file": "x"}, "UNIMPLEMENTED", SAME),
)  # fmt: skip
for _text, _settings, _code, _triton in TRACES:
    row("8", "sync", f"trace settings: {_text}", _code, triton=_triton)(
        partial(
            lambda servers, settings: servers.client.update_trace_settings("", settings), settings=_settings
        )
    )


@row("8", "sync", "trace settings of an unknown model", INVALID)
def _(servers: Servers) -> Any:
    return servers.client.get_trace_settings("nope")


LOG = {
    "log_error": "bool_param", "log_file": "string_param", "log_format": "string_param",
    "log_info": "bool_param", "log_verbose_level": "uint32_param", "log_warning": "bool_param",
}  # fmt: skip


@row("8", "sync", "log settings: the keys, each with its type", fact=LOG)
def _(servers: Servers) -> Any:
    found = servers.client.get_log_settings().settings
    return {name: found[name].WhichOneof("parameter_choice") for name in sorted(found)}


@row("8", "sync", "log settings: changed, told, changed back", fact=("ISO8601", "default"))
def _(servers: Servers) -> Any:
    def change(to: str) -> Any:
        servers.client.update_log_settings({"log_format": to})
        return servers.client.get_log_settings().settings["log_format"].string_param

    return change("ISO8601"), change("default")


def set_log(servers: Servers, settings: dict[str, dict[str, Any]]) -> Any:
    request = pb.LogSettingsRequest()
    for name, value in settings.items():
        request.settings[name].CopyFrom(pb.LogSettingsRequest.SettingValue(**value))
    return servers.stub().LogSettings(request, timeout=DEADLINE)


LOGS: tuple[tuple[str, dict[str, dict[str, Any]], str, str], ...] = (
    ("an unknown key", {"log_mine": {"bool_param": True}}, INVALID, NO_EFFECT),
    ("an unknown format", {"log_format": {"string_param": "JSON"}}, INVALID, SAME),
    ("a boolean that is a number", {"log_info": {"uint32_param": 1}}, INVALID, SAME),
    ("a boolean without a value", {"log_info": {}}, INVALID, SAME),
    ("a level that is a text", {"log_verbose_level": {"string_param": "1"}}, INVALID, SAME),
    ("another file, which no client may choose", {"log_file": {"string_param": "x"}}, "UNIMPLEMENTED", SAME),
)
for _text, _log, _code, _triton in LOGS:
    row("8", "message", f"log settings: {_text}", _code, triton=_triton)(partial(set_log, settings=_log))


# Beside the protocol's own service


def health(servers: Servers, request: bytes) -> Any:
    return servers.channels["served"].unary_unary("/grpc.health.v1.Health/Check")(request, timeout=DEADLINE)


SERVING = b"\x08\x01"


@row("8", "message", "grpc.health.v1 Check: SERVING", fact=SERVING)
def _(servers: Servers) -> Any:
    return health(servers, b"")


@row("8", "message", "grpc.health.v1 Check of a model", fact=SERVING)
def _(servers: Servers) -> Any:
    return health(servers, b"\x0a\x05fixed")


@row("8", "message", "grpc.health.v1 Check of an unknown service", "NOT_FOUND",
     triton="differs: SERVING, it looks at no name")  # fmt: skip
def _(servers: Servers) -> Any:
    return health(servers, b"\x0a\x04nope")


@row("8", "message", "grpc.health.v1 Watch: the present status comes first", fact=SERVING,
     triton="differs: UNIMPLEMENTED")  # fmt: skip
def _(servers: Servers) -> Any:
    call = servers.channels["served"].unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=DEADLINE)
    first = next(call)
    call.cancel()
    return first


@row("8", "sync", "a request of 5 MB, past gRPC's usual limit of 4 MiB, and its answer", fact=(1, 1_300_000))
def _(servers: Servers) -> Any:
    x = tensor("x", np.zeros((1, 1_300_000), np.float32), "FP32")
    return servers.infer("identity_fp32", x).as_numpy("y").shape
