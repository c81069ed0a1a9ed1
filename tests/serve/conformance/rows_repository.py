"""§5, §7 and §8: loading, unloading and the index, on a server in explicit mode."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2 as pb

from tests.serve.conformance.servers import DEADLINE, count, eventually, floats, occupy, status
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"
FOUR = floats(values=[[1, 2, 3, 4]])


def states(servers: Servers, name: str, **options: Any) -> Any:
    models = servers.controlled.get_model_repository_index(**options).models
    return [(found.version, found.state) for found in models if found.name == name]


def reason(servers: Servers, name: str) -> str:
    models = servers.controlled.get_model_repository_index().models
    return next(str(found.reason) for found in models if found.name == name)


@row("8", "sync", "index: what was never loaded has neither version nor state", fact=[("", "")])
def _(servers: Servers) -> Any:
    return states(servers, "loadable")


@row("8", "sync", "index: what is loaded is READY", fact=[("1", "READY")])
def _(servers: Servers) -> Any:
    return states(servers, "kept")


@row("8", "message", "index: ready=true leaves the others out", fact=["kept"])
def _(servers: Servers) -> Any:
    answer = servers.stub("controlled").RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
    return [found.name for found in answer.models]


LOOKUPS = {
    "ModelInfer": lambda client, version: client.infer("loadable", [FOUR], model_version=version),
    "ModelMetadata": lambda client, version: client.get_model_metadata("loadable", version),
    "ModelConfig": lambda client, version: client.get_model_config("loadable", version),
}


def look_up(servers: Servers, rpc: str, version: str) -> Any:
    return LOOKUPS[rpc](servers.controlled, version)


for _rpc in LOOKUPS:
    row("7", "sync", f"{_rpc} of a model that was never loaded", "NOT_FOUND")(
        partial(look_up, rpc=_rpc, version="")
    )


@row("7", "sync", "ModelReady of a model that was never loaded", fact=False)
def _(servers: Servers) -> Any:
    return servers.controlled.is_model_ready("loadable")


@row("7", "sync", "load: then the model is ready, and answers", fact=(True, "2"))
def _(servers: Servers) -> Any:
    servers.controlled.load_model("loadable")
    answer = servers.controlled.infer("loadable", [FOUR]).get_response()
    return servers.controlled.is_model_ready("loadable"), answer.model_version


@row("7", "sync", "load: again, a reload")
def _(servers: Servers) -> Any:
    servers.controlled.load_model("loadable")


@row("7", "sync", "unload: then the model is not ready", fact=False)
def _(servers: Servers) -> Any:
    servers.controlled.unload_model("loadable")
    return servers.controlled.is_model_ready("loadable")


for _rpc in LOOKUPS:
    row("7", "sync", f"{_rpc} of an unloaded model", "NOT_FOUND")(partial(look_up, rpc=_rpc, version=""))


@row("8", "sync", "index: what is unloaded is UNAVAILABLE, the reason is 'unloaded'",
     fact=([("2", "UNAVAILABLE")], "unloaded"))  # fmt: skip
def _(servers: Servers) -> Any:
    eventually(lambda: states(servers, "loadable") != [("2", "UNLOADING")])
    return states(servers, "loadable"), reason(servers, "loadable")


@row("7", "sync", "a version that is there and not ready", "UNAVAILABLE")
def _(servers: Servers) -> Any:
    return servers.controlled.infer("loadable", [FOUR], model_version="2")


@row("7", "sync", "unload: twice")
def _(servers: Servers) -> Any:
    servers.controlled.unload_model("loadable")


@row("7", "sync", "unload: an unknown model")
def _(servers: Servers) -> Any:
    servers.controlled.unload_model("nope")


@row("5", "sync", "unload: with unload_dependents, as tritonclient can say it")
def _(servers: Servers) -> Any:
    servers.controlled.unload_model("loadable", unload_dependents=True)


@row("7", "sync", "load: an unknown model", "INTERNAL")
def _(servers: Servers) -> Any:
    servers.controlled.load_model("nope")


@row("7", "sync", "load: an empty name", "INTERNAL")
def _(servers: Servers) -> Any:
    servers.controlled.load_model("")


@row("7", "sync", "load: a model that can't be", INVALID)
def _(servers: Servers) -> Any:
    servers.controlled.load_model("broken")


@row(
    "8",
    "sync",
    "index: what can't be loaded is UNAVAILABLE, with a reason",
    fact=([("1", "UNAVAILABLE")], True),
)
def _(servers: Servers) -> Any:
    return states(servers, "broken"), len(reason(servers, "broken")) > 0


@row("7", "sync", "a model whose load failed: no version is there", fact=["NOT_FOUND", False])
def _(servers: Servers) -> Any:
    asked = status(lambda: servers.controlled.infer("broken", [FOUR]))
    return [asked, servers.controlled.is_model_ready("broken")]


@row("7", "sync", "unloading while a request runs: it is answered, and the version takes no more",
     fact=["OK", "UNAVAILABLE", "NOT_FOUND", False])  # fmt: skip
def _(servers: Servers) -> Any:
    servers.controlled.load_model("slow")
    calls = occupy(servers.controlled, 40_000)
    stub = servers.stub("controlled")
    unloading = stub.RepositoryModelUnload.future(pb.RepositoryModelUnloadRequest(model_name="slow"))
    eventually(lambda: not servers.controlled.is_model_ready("slow"))
    later = [
        status(lambda: servers.controlled.infer("slow", [count(1)], model_version="1")),
        status(lambda: servers.controlled.infer("slow", [count(1)])),
    ]
    first = calls.next()[1]
    unloading.result(DEADLINE)
    return [first, *later, servers.controlled.is_model_ready("slow")]


# Parameters of loads


def config(servers: Servers, **fields: Any) -> str:
    return json.dumps(servers.addresses["controlled"]["config"] | fields)


@row("5", "sync", "load with a config: it is the model's from then on", fact=[["1"], ["1", "2"]])
def _(servers: Servers) -> Any:
    versions = []
    policies: tuple[dict[str, Any], ...] = ({"specific": {"versions": [1]}}, {"all": {}})
    for policy in policies:
        servers.controlled.load_model("loadable", config=config(servers, version_policy=policy))
        versions.append(sorted(servers.controlled.get_model_metadata("loadable").versions))
    return versions


@row("5", "sync", "load without a config: that of the folder again", fact=["2"],
     triton="differs: keeps the config that was sent before")  # fmt: skip
def _(servers: Servers) -> Any:
    servers.controlled.load_model("loadable")
    return list(servers.controlled.get_model_metadata("loadable").versions)


@row("5", "sync", "load with files: a model that the repository doesn't have", fact="3")
def _(servers: Servers) -> Any:
    address = servers.addresses["controlled"]
    files = {f"file:3/{address['file']}": Path(address["graph"]).read_bytes()}
    servers.controlled.load_model("new", config=config(servers), files=files)
    return servers.controlled.infer("new", [FOUR]).get_response().model_version


@row("8", "sync", "index: a model that came over the wire is in it", fact=[("3", "READY")],
     triton="differs: serves it and doesn't list it")  # fmt: skip
def _(servers: Servers) -> Any:
    return states(servers, "new")


def load(servers: Servers, parameters: dict[str, Any]) -> Any:
    request = pb.RepositoryModelLoadRequest(model_name="kept")
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(pb.ModelRepositoryParameter(**value))
    return servers.stub("controlled").RepositoryModelLoad(request, timeout=DEADLINE)


LOADS = (
    ("files without a config", {"file:1/model.onnx": {"bytes_param": b"x"}}, "INTERNAL"),
    ("an unknown parameter", {"mine": {"string_param": "x"}}, INVALID),
    ("a config that is no text", {"config": {"int64_param": 1}}, INVALID),
    ("a config that is no JSON", {"config": {"string_param": "{"}}, "INTERNAL"),
    (
        "a file that is no bytes",
        {"config": {"string_param": "{}"}, "file:1/m": {"string_param": "x"}},
        INVALID,
    ),
)
for _text, _parameters, _code in LOADS:
    row("5", "message", f"load with {_text}", _code)(partial(load, parameters=_parameters))


@row("5", "sync", "after loads that were refused the model still answers", fact=[[1.0, 2.0, 3.0, 4.0]])
def _(servers: Servers) -> Any:
    return servers.controlled.infer("kept", [FOUR]).as_numpy("y").tolist()


@row("5", "message", "unload_dependents that is no boolean", INVALID)
def _(servers: Servers) -> Any:
    request = pb.RepositoryModelUnloadRequest(model_name="loadable")
    request.parameters["unload_dependents"].string_param = "true"
    return servers.stub("controlled").RepositoryModelUnload(request, timeout=DEADLINE)


def with_repository(servers: Servers, rpc: str, request: Any) -> Any:
    return getattr(servers.stub("controlled"), rpc)(request, timeout=DEADLINE)


for _rpc, _request in (
    ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="r")),
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(repository_name="r", model_name="kept")),
    ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(repository_name="r", model_name="kept")),
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(repository_name="r")),
):
    _what = "names only a repository" if not getattr(_request, "model_name", "r") else "names a repository"
    row("7", "message", f"{_rpc} that {_what}", "UNIMPLEMENTED")(
        partial(with_repository, rpc=_rpc, request=_request)
    )

for _rpc, _request in (
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(repository_name="loadable")),
    ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(repository_name="loadable")),
):

    def kserve(servers: Servers, rpc: str, request: Any) -> Any:
        answer = with_repository(servers, rpc, request).SerializeToString()
        return pb.RepositoryIndexRequest.FromString(answer).repository_name

    row("7", "message", f"{_rpc} in KServe's dialect: the model's name is field 1, there and back",
        fact="loadable",
        triton="differs: UNIMPLEMENTED, its field 1 is a repository's name")(
        partial(kserve, rpc=_rpc, request=_request)
    )  # fmt: skip

for _text, _act in {
    "load": lambda client: client.load_model("latest"),
    "unload": lambda client: client.unload_model("latest"),
}.items():
    row("7", "sync", f"{_text} when the control mode is none", "UNAVAILABLE")(
        partial(lambda servers, act: act(servers.client), act=_act)
    )
