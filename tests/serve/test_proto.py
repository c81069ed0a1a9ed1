"""The committed code in serve/pb is what protoc makes of proto/, and says what tritonclient says.

Run as a program with module names, this file prints their descriptors as JSON: tritonclient's modules
register the same names as ours, so they need a process of their own.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[2]
OURS = ("serve.pb.grpc_service_pb2", "serve.pb.model_config_pb2")
TRITON = ("tritonclient.grpc.service_pb2", "tritonclient.grpc.model_config_pb2")

# What we have and a tritonclient may not have, with the reason. Nothing else may differ, in either direction.
OIP = "the Open Inference Protocol has it, Triton has not"
KSERVE = "KServe's SDK reads it, Triton's clients skip it"
NEWER = "tritonclient 2.60 is too old to have it"
ADDED = {
    "inference.ModelEnsembling.max_inflight_requests": NEWER,
    "inference.ModelMetadataResponse.properties": OIP,
    "inference.ModelMetadataResponse.PropertiesEntry": OIP,
    "inference.ModelMetadataResponse.PropertiesEntry.key": OIP,
    "inference.ModelMetadataResponse.PropertiesEntry.value": OIP,
    "inference.RepositoryModelLoadResponse.model_name": KSERVE,
    "inference.RepositoryModelLoadResponse.isLoaded": KSERVE,
    "inference.RepositoryModelUnloadResponse.model_name": KSERVE,
    "inference.RepositoryModelUnloadResponse.isUnloaded": KSERVE,
}

type_name = FieldDescriptorProto.Type.Name
label_name = FieldDescriptorProto.Label.Name


def test_committed_code_is_what_protoc_generates(tmp_path: Path) -> None:
    _protoc(tmp_path, "model_config", "--python_out", "--pyi_out")
    _protoc(tmp_path, "grpc_service", "--python_out", "--pyi_out", "--grpc_python_out")
    generated = _contents((tmp_path / "serve/pb").iterdir())
    committed = _contents((ROOT / "serve/pb").glob("*_pb2*"))
    stale = sorted(n for n in generated | committed if generated.get(n) != committed.get(n))
    assert not stale, (
        f"{stale} in serve/pb differ from what protoc makes of proto/: run `make proto` with the "
        "grpcio-tools that pyproject.toml pins, and commit the result"
    )


def test_descriptors_are_those_of_tritonclient_and_the_listed_additions() -> None:
    ours = describe(OURS)
    theirs = _describe_elsewhere(TRITON)
    missing_or_changed = {n: (d, ours.get(n)) for n, d in theirs.items() if ours.get(n) != d}
    assert not missing_or_changed, "name: (tritonclient's, ours)"
    assert sum(d[0] == "rpc" for d in theirs.values()) == 20
    assert ours.keys() - theirs.keys() <= ADDED.keys(), "neither tritonclient's nor in ADDED"
    assert ADDED.keys() <= ours.keys(), "in ADDED but no longer in proto/"


def test_generated_code_is_imported_without_a_warning() -> None:
    program = "import serve.pb.grpc_service_pb2_grpc, serve.pb.model_config_pb2"
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, check=True)


def test_proto_holds_no_python() -> None:
    """A package of this name would shadow proto-plus for everything that runs from the checkout."""
    assert {path.suffix for path in (ROOT / "proto").iterdir()} == {".proto", ".md"}


def describe(modules: Sequence[str]) -> dict[str, list[object]]:
    """What the generated modules declare: full name → its kind and all that has to agree on the wire."""
    entries: dict[str, list[object]] = {}
    for module in modules:
        file = FileDescriptorProto()
        importlib.import_module(module).DESCRIPTOR.CopyToProto(file)
        for message in file.message_type:
            entries.update(_message(file.package, message))
        for enum in file.enum_type:
            entries.update(_enum(file.package, enum))
        for service in file.service:
            entries.update(_service(file.package, service))
    return entries


def _message(scope: str, message: DescriptorProto) -> Iterator[tuple[str, list[object]]]:
    name = f"{scope}.{message.name}"
    yield name, ["message", message.options.map_entry]
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        kind = [type_name(field.type), field.type_name, label_name(field.label)]
        yield f"{name}.{field.name}", ["field", field.number, *kind, oneof]
    for nested in message.nested_type:
        yield from _message(name, nested)
    for enum in message.enum_type:
        yield from _enum(name, enum)


def _enum(scope: str, enum: EnumDescriptorProto) -> Iterator[tuple[str, list[object]]]:
    for value in enum.value:
        yield f"{scope}.{enum.name}.{value.name}", ["enum value", value.number]


def _service(scope: str, service: ServiceDescriptorProto) -> Iterator[tuple[str, list[object]]]:
    for rpc in service.method:
        streaming = [rpc.client_streaming, rpc.server_streaming]
        yield f"{scope}.{service.name}.{rpc.name}", ["rpc", rpc.input_type, rpc.output_type, *streaming]


def _describe_elsewhere(modules: Sequence[str]) -> dict[str, list[object]]:
    program = [sys.executable, "-P", __file__, *modules]
    result = subprocess.run(program, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    entries: dict[str, list[object]] = json.loads(result.stdout)
    return entries


def _protoc(out: Path, name: str, *plugins: str) -> None:
    outputs = [f"{plugin}={out}" for plugin in plugins]
    program = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-Iserve/pb=proto",
        *outputs,
        f"serve/pb/{name}.proto",
    ]
    subprocess.run(program, cwd=ROOT, check=True)


def _contents(paths: Iterable[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


if __name__ == "__main__":
    json.dump(describe(sys.argv[1:]), sys.stdout)
