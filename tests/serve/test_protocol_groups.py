"""Restricted groups of RPCs: every method that the server has is in one, and none passes without its key."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serve.pb import grpc_service_pb2 as pb
from serve.settings import SettingsError
from serve.transport.security.interceptor import AccessInterceptor
from serve.transport.security.protocol_groups import GROUP_OF, GROUPS, Restriction, parse_restrictions
from serve.transport.security.tokens import Tokens
from tests.graphs import scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer

TOKEN = "0123456789abcdef"  # noqa: S105 - of a test
AUTHORIZATION = ("authorization", f"Bearer {TOKEN}")
OWN_MESSAGES = ("This protocol is restricted", "this server needs a token", "the bearer token", "no group of")


def described() -> list[str]:
    """Every method of the services that the server registers, from their descriptors."""
    services: list[Any] = [
        pb.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    ]
    names = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    return names + [name.replace("v1alpha", "v1") for name in names if "v1alpha" in name]


METHODS = described()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]) -> RunningServer:
    """A server that wants a token for everything, and another key for each group."""
    root = tmp_path_factory.mktemp("groups")
    write_model(root / "models" / "double", scaled(2))
    (root / "tokens").write_text(TOKEN)
    keys = [f"--grpc-restricted-protocol={group}:Key-{group}=Value of {group}" for group in GROUPS]
    return serve("--model-repository", root / "models", f"--auth-token-file={root / 'tokens'}", *keys)


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.url) as channel:
        yield channel


def call(channel: grpc.Channel, method: str, *metadata: tuple[str, str]) -> tuple[str, str]:
    """Send one empty message, which every method takes; the status, OK with the first answer."""
    invoke: Any = channel.stream_stream(method)
    answers = invoke(iter([b""]), metadata=metadata, timeout=60)
    try:
        next(answers, None)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    finally:
        answers.cancel()
    return "OK", ""


def key(group: str, value: str | None = None) -> tuple[str, str]:
    return f"triton-grpc-protocol-key-{group}", f"Value of {group}" if value is None else value


@pytest.mark.parametrize("method", METHODS)
def test_no_method_passes_without_token_and_key(channel: grpc.Channel, method: str) -> None:
    group = GROUP_OF[method]
    other = next(name for name in GROUPS if name != group)
    assert call(channel, method, key(group))[0] == "UNAUTHENTICATED"
    wrong = ("authorization", "Bearer 0123456789abcdeF")
    assert call(channel, method, wrong, key(group))[0] == "UNAUTHENTICATED"
    refused = (
        "UNAVAILABLE",
        f"This protocol is restricted, expecting header 'triton-grpc-protocol-key-{group}'",
    )
    assert call(channel, method, AUTHORIZATION) == refused
    assert call(channel, method, AUTHORIZATION, key(group, "value")) == refused
    assert call(channel, method, AUTHORIZATION, key(group, "")) == refused
    assert call(channel, method, AUTHORIZATION, key(other)) == refused
    code, details = call(channel, method, AUTHORIZATION, key(group))
    assert not any(message in details for message in OWN_MESSAGES), (code, details)


def test_every_method_is_in_a_group() -> None:
    # 20 of the protocol, health's Check and Watch (its List in newer releases), reflection in two versions.
    assert len(METHODS) >= 24
    assert set(METHODS) <= GROUP_OF.keys()
    later = {"/grpc.health.v1.Health/List"}
    assert GROUP_OF.keys() - set(METHODS) <= later
    assert set(GROUP_OF.values()) == set(GROUPS)


def test_the_server_has_no_service_that_the_test_does_not_know(channel: grpc.Channel) -> None:
    listed = reflect(channel, reflection_pb2.ServerReflectionRequest(list_services="")).list_services_response
    found = set()
    for service in listed.service:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service.name)
        for data in reflect(channel, request).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            found |= {f"/{file.package}.{s.name}/{m.name}" for s in file.service for m in s.method}
    assert found == set(METHODS)


def reflect(channel: grpc.Channel, request: Any) -> Any:
    ask = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return next(iter(ask(iter([request]), metadata=(AUTHORIZATION, key("metadata")), timeout=60)))


def test_the_groups_are_tritons() -> None:
    rpcs: dict[str, set[str]] = {group: set() for group in GROUPS}
    for method, group in GROUP_OF.items():
        if "GRPCInferenceService" in method:
            rpcs[group].add(method.rsplit("/")[-1])
    assert rpcs["health"] == {"ServerLive", "ServerReady", "ModelReady"}
    assert rpcs["inference"] == {"ModelInfer", "ModelStreamInfer"}
    assert rpcs["model-repository"] == {"RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"}
    assert len(rpcs["shared-memory"]) == 6
    assert sum(map(len, rpcs.values())) == 20


def test_tritonclient_passes_with_its_headers(server: RunningServer) -> None:
    headers = dict([AUTHORIZATION, key("health"), key("inference"), key("metadata")])
    script = (
        "import json, sys, numpy, tritonclient.grpc as triton\n"
        "client, headers = triton.InferenceServerClient(sys.argv[1]), json.loads(sys.argv[2])\n"
        "tensor = triton.InferInput('x', [1, 4], 'FP32')\n"
        "tensor.set_data_from_numpy(numpy.ones((1, 4), numpy.float32))\n"
        "print(client.is_server_live(headers), client.get_server_metadata(headers).name,\n"
        "      client.infer('double', [tensor], headers=headers).as_numpy('y').tolist())\n"
        "try:\n"
        "    client.get_model_config('double', headers=headers)\n"
        "except triton.InferenceServerException as error:\n"
        "    print(error.status())\n"
    )
    command = [sys.executable, "-c", script, server.url, json.dumps(headers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "True onnxedge [[2.0, 2.0, 2.0, 2.0]]\nStatusCode.UNAVAILABLE\n", done.stderr


def test_a_group_alone_leaves_the_others_open(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    write_model(tmp_path / "double", scaled(2))
    server = serve("--model-repository", tmp_path, "--grpc-restricted-protocol=model-repository,trace:k=v")
    with grpc.insecure_channel(server.url) as channel:
        outcomes = {method: call(channel, method) for method in METHODS}
    restricted = {method for method, (_, details) in outcomes.items() if "restricted" in details}
    assert restricted == {name for name, group in GROUP_OF.items() if group in ("model-repository", "trace")}
    assert outcomes["/grpc.health.v1.Health/Check"][0] == "OK"
    assert server.stop() == 0


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[grpc.Channel]:
    """A service that nobody put into a group, behind the interceptor."""
    (tmp_path / "tokens").write_text(TOKEN)
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"secret")
    interceptor = AccessInterceptor(Tokens(tmp_path / "tokens"), {})
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, interceptors=[interceptor])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("new.Service", {"Do": handler}),)
        )
        server.add_registered_method_handlers("new.Registered", {"Do": handler})
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        server.stop(None).wait()


@pytest.mark.parametrize("service", ["new.Service", "new.Registered"])
def test_a_method_in_no_group_is_denied(guarded: grpc.Channel, service: str) -> None:
    assert call(guarded, f"/{service}/Do")[0] == "UNAUTHENTICATED"
    assert call(guarded, f"/{service}/Do", AUTHORIZATION)[0] == "PERMISSION_DENIED"


def test_a_method_that_is_not_there_is_unimplemented_to_who_may_ask(guarded: grpc.Channel) -> None:
    assert call(guarded, "/new.Service/Nothing")[0] == "UNAUTHENTICATED"
    assert call(guarded, "/new.Service/Nothing", AUTHORIZATION) == ("UNIMPLEMENTED", "Method not found!")


def test_options_make_a_header_for_each_group() -> None:
    found = parse_restrictions(["health, trace:Admin-Key = a:b=c", "inference:k=v"])
    admin = Restriction("triton-grpc-protocol-admin-key", b"a:b=c")
    assert found == {
        "health": admin,
        "trace": admin,
        "inference": Restriction("triton-grpc-protocol-k", b"v"),
    }


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["health"], "expected GROUP[,GROUP]:KEY=VALUE"),
        (["health:key"], "expected GROUP[,GROUP]:KEY=VALUE"),
        (["health:=secret"], "expected GROUP[,GROUP]:KEY=VALUE"),
        (["health:key="], "expected GROUP[,GROUP]:KEY=VALUE"),
        (["health:a key=secret"], "KEY of letters"),
        (["health:key-bin=secret"], "not ending with -bin"),
        (["health:key=secrét"], "VALUE of ASCII"),
        (["helth:key=secret"], "unknown group 'helth', expected one of health, metadata, inference, shared-"),
        ([",health:key=secret"], "unknown group ''"),
        (["health,health:key=secret"], "group 'health' is named twice"),
        (["trace,health:a=secret", "health:b=secret"], "group 'health' is named twice"),
    ],
)
def test_wrong_options_are_refused_without_their_value(options: list[str], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_restrictions(options)
    assert problem in str(caught.value)
    assert "secr" not in str(caught.value)
