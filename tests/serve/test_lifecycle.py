"""What follows what in a model's life, and what a look at the disk leads to: no server, no graph."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from serve.errors import InternalError, InvalidArgumentError, ModelLoadError, UnavailableError
from serve.model_repository.lifecycle import Model
from serve.model_repository.model_folder import (
    check_repository,
    is_file_name,
    model_folders,
    model_names,
    stamp,
)
from serve.model_repository.overrides import parse_override
from serve.model_repository.polling import Changes, changes
from serve.model_repository.turns import Turns
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from serve.model.version import ModelVersion


def versions(*numbers: int) -> dict[int, ModelVersion]:
    return {number: cast("ModelVersion", object()) for number in numbers}


def states(model: Model) -> list[tuple[str, str, str]]:
    return [(state.version, state.state, state.reason) for state in model.states]


def contents(*numbers: int) -> dict[int, str]:
    return dict.fromkeys(numbers, "")


def test_a_first_load_and_an_unload() -> None:
    model = Model("m").loading([1, 2])
    assert states(model) == [("1", "LOADING", ""), ("2", "LOADING", "")]
    assert not model.ready
    model = model.loaded(versions(1, 2), contents(1, 2))
    assert states(model) == [("1", "READY", ""), ("2", "READY", "")]
    assert model.ready
    model = model.unloading()
    assert (states(model), model.versions) == ([("1", "UNLOADING", ""), ("2", "UNLOADING", "")], {})
    model = model.gone([1]).gone([2])
    assert states(model) == [("1", "UNAVAILABLE", "unloaded"), ("2", "UNAVAILABLE", "unloaded")]
    assert model.ready, "nothing is missing: it was to go"


def test_a_reload_serves_the_old_until_the_new_are_there() -> None:
    model = Model("m").loaded(versions(1), contents(1))
    old = model.versions[1]
    reloading = model.loading([1, 2])
    assert reloading.versions[1] is old
    assert states(reloading) == [("1", "READY", ""), ("2", "LOADING", "")]
    new = versions(2)
    reloaded = reloading.loaded(new, contents(2))
    assert reloaded.versions == new
    assert states(reloaded) == [("1", "UNLOADING", ""), ("2", "READY", "")]
    assert states(reloaded.gone([1])) == [("1", "UNAVAILABLE", "unloaded"), ("2", "READY", "")]


def test_a_version_that_is_replaced_never_shows_as_unloading() -> None:
    model = Model("m").loaded(versions(1), contents(1)).loading([1]).loaded(versions(1), contents(1))
    assert states(model) == states(model.gone([1])) == [("1", "READY", "")]


def test_a_failed_reload_keeps_the_old_and_says_why() -> None:
    model = Model("m").loaded(versions(1), contents(1)).loading([1, 2])
    model = model.failed({2: "bad graph"})
    assert states(model) == [("1", "READY", ""), ("2", "UNAVAILABLE", "bad graph")]
    assert model.ready
    model = model.failed({None: "bad config"})
    assert states(model) == [("1", "READY", "bad config")]
    assert states(model.loaded(versions(1), contents(1))) == [("1", "READY", "")]


def test_a_failed_first_load_is_not_ready_until_it_is_unloaded() -> None:
    model = Model("m").loading([1]).failed({1: "bad graph"})
    assert states(model) == [("1", "UNAVAILABLE", "bad graph")]
    assert not model.ready
    assert states(model.unloading()) == [("1", "UNAVAILABLE", "unloaded")]
    assert model.unloading().ready
    assert states(Model("m").failed({None: "bad config"})) == [("", "UNAVAILABLE", "bad config")]


def test_a_version_loaded_again_while_it_unloads_stays_when_the_old_one_is_gone() -> None:
    model = Model("m").loaded(versions(1), contents(1)).unloading().loading([1])
    assert states(model) == [("1", "LOADING", "")]
    model = model.gone([1])
    assert states(model) == [("1", "LOADING", "")]
    assert states(model.loaded(versions(1), contents(1)).gone([1])) == [("1", "READY", "")]


@pytest.mark.parametrize(
    ("served", "before", "now", "load", "unload"),
    [
        ({}, {}, {"a": 1}, (), ()),  # seen for the first time: may be half there
        ({}, {"a": 1}, {"a": 1}, ("a",), ()),
        ({}, {"a": 1}, {"a": 2}, (), ()),  # still being written
        ({"a": 1}, {"a": 1}, {"a": 1}, (), ()),
        ({"a": 1}, {"a": 1}, {"a": 2}, (), ()),
        ({"a": 1}, {"a": 2}, {"a": 2}, ("a",), ()),
        ({"a": 1}, {"a": 1}, {}, (), ()),  # away for a moment, as while it is replaced
        ({"a": 1}, {}, {"a": 1}, (), ()),
        ({"a": 1}, {}, {}, (), ("a",)),
        ({"a": 1, "b": 1}, {"b": 2, "c": 1}, {"b": 2, "c": 1}, ("b", "c"), ("a",)),
    ],
)
def test_two_looks_decide_what_changes(
    served: dict[str, int], before: dict[str, int], now: dict[str, int], load: Any, unload: Any
) -> None:
    assert changes(served, before, now) == Changes(load, unload)


def test_a_stamp_tells_versions_apart_and_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2" / "parts").mkdir(parents=True)
    (tmp_path / "1" / "model.onnx").write_text("a")
    (tmp_path / "2" / "parts" / "weights").write_text("b")
    (tmp_path / "config.pbtxt").write_text("")
    first = stamp(tmp_path)
    assert first == stamp(tmp_path)
    (tmp_path / "1" / ".hidden").write_text("unfinished")
    assert first == stamp(tmp_path)
    (tmp_path / "2" / "parts" / "weights").write_text("longer")
    second = stamp(tmp_path)
    assert (second.versions[1], second.shared) == (first.versions[1], first.shared)
    assert second.versions[2] != first.versions[2]
    (tmp_path / "new").write_text("b")
    (tmp_path / "new").replace(tmp_path / "config.pbtxt")
    assert stamp(tmp_path).shared != first.shared


def test_a_stamp_of_same_size_and_time_differs_by_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    model = tmp_path / "1" / "model.onnx"
    model.write_text("a")
    first, status = stamp(tmp_path), model.stat()
    (tmp_path / "other").write_text("b")
    os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "other").replace(model)
    assert stamp(tmp_path) != first


def test_links_in_circles_and_floods_of_files_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "again").symlink_to(tmp_path)
    stamp(tmp_path)
    monkeypatch.setattr("serve.model_repository.model_folder._MAX_FILES", 3)
    for number in range(4):
        (tmp_path / f"file{number}").touch()
    with pytest.raises(ModelLoadError, match="more than 3 files"):
        stamp(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../m", "a/b", "/etc", "a\\b", "a\0b", ".git", "x" * 256, "é" * 128, "\udcff" * 99],
)
def test_what_is_no_file_name_is_not_looked_up(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    assert not is_file_name(name)
    assert model_folders([tmp_path / "m", tmp_path], name) == []


def test_a_repository_is_a_folder_of_folders(tmp_path: Path) -> None:
    (tmp_path / "model" / "1").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README").touch()
    check_repository(tmp_path)
    assert model_names(tmp_path) == {"model"}
    with pytest.raises(ModelLoadError, match="give its parent"):
        check_repository(tmp_path / "model")
    with pytest.raises(ModelLoadError, match="not a folder"):
        check_repository(tmp_path / "README")


def test_turns_are_taken_one_by_one_for_a_name_and_beside_each_other_for_others() -> None:
    turns, order = Turns(3), []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with turns.take("a"):
            order.append("second")

    with turns.take("a"), turns.take("b"):
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait(30)
        while turns._taken < 3:
            pass
        with pytest.raises(UnavailableError, match="3 loads and unloads are under way"), turns.take("c"):
            order.append("never")
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert (turns._taken, turns._turns) == (0, {})


def parameters(**values: Any) -> Any:
    request = pb.RepositoryModelLoadRequest()
    for key, value in values.items():
        field = "bytes_param" if isinstance(value, bytes) else "string_param"
        setattr(request.parameters[key], field, value)
    return request.parameters


def test_an_override_is_a_config_and_files() -> None:
    assert parse_override(parameters()) is None
    override = parse_override(
        parameters(
            **{"config": '{"maxBatchSize": 4, "version_policy": {"all": {}}}', "file:3/model.onnx": b"g"}
        )
    )
    assert override is not None
    assert override.config.max_batch_size == 4
    assert override.config.version_policy.HasField("all")
    assert override.files == {(3, "model.onnx"): b"g"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"konfig": "{}"}, "unrecognized load parameter 'konfig'"),
        ({"config": b"{}"}, "invalid value type for load parameter 'config', expected string_param"),
        ({"config": "{}", "file:1/m": "text"}, "'file:1/m', expected bytes_param"),
        ({"config": "{"}, "expected a ModelConfig as JSON"),
        ({"config": "[]"}, "expected a ModelConfig as JSON"),
        ({"config": '{"nonsense": 1}'}, 'no field named "nonsense"'),
        ({"config": '{"max_batch_size": "lots"}'}, "max_batch_size"),
        ({"config": '{"input":' + "[" * 100_000}, "expected a ModelConfig as JSON"),
        ({"config": '{"input":' + "[]," * 1_000_000}, "1048576 at most"),
        ({"file:1/model.onnx": b""}, "'config' is missing"),
        *(
            ({"config": "{}", key: b""}, "expected 'file:VERSION/NAME'")
            for key in (
                "file:", "file:1", "file:1/", "file:/m", "file:0/m", "file:-1/m", "file:01/m", "file:²/m",
                "file:1/../m", "file:1/a/b", "file:1/..", "file:1/.hidden", "file:1/a\\b", "file:1/a\0b",
                f"file:{'9' * 30}/m", f"file:1/{'x' * 256}", "file:../1/m", "file:1//etc/passwd",
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_override_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidArgumentError, InternalError), match=message.replace("[", r"\[")):
        parse_override(parameters(**given))
