"""The repository without a server: what is loaded when, from where, and what lookups say meanwhile."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serve.core import InferenceCore
from serve.errors import InternalError, InvalidArgumentError, NotFoundError, UnavailableError
from serve.model_repository.lifecycle import Model
from serve.model_repository.overrides import Override
from serve.model_repository.repository import MOST_CHANGES, Repository
from serve.pb import model_config_pb2
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, Tensor
from serve.settings import ServerSettings
from tests.graphs import identity, scaled, slow, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Open = Callable[..., Repository]

ALL = "version_policy { all {} }"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One model, `m`, whose version N multiplies by N."""
    root = tmp_path / "models"
    for number in (1, 2, 3):
        write_model(root / "m", scaled(number), number)
    return root


@pytest.fixture
def opened() -> Iterator[Open]:
    repositories: list[Repository] = []

    def open_repository(*roots: Path, mode: str = "explicit", **settings: Any) -> Repository:
        repositories.append(
            Repository(ServerSettings(model_repository=roots, model_control_mode=mode, **settings))
        )
        repositories[-1].load()
        return repositories[-1]

    yield open_repository
    for repository in repositories:
        repository.close()


def index(repository: Repository) -> list[tuple[str, str, str, str]]:
    return [(s.name, s.version, s.state, s.reason) for s in repository.index()]


def answer(repository: Repository, name: str = "m", version: str = "") -> float:
    core = InferenceCore(repository._settings, repository)
    x = Tensor("x", DATATYPES["FP32"], np.ones((1, 4), np.float32))
    response = core.infer(InferRequest(name, version, (x,)), Call(), inline=True).result(60)
    value: float = response.outputs[0].array[0, 0].item()
    return value


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", [3]),
        ("version_policy { latest { num_versions: 2 } }", [2, 3]),
        (ALL, [1, 2, 3]),
        ("version_policy { specific { versions: [1, 3] } }", [1, 3]),
    ],
)
def test_the_version_policy_decides(root: Path, opened: Open, policy: str, served: list[int]) -> None:
    (root / "m" / "config.pbtxt").write_text(policy)
    repository = opened(root, mode="none")
    assert [version.version for version in repository] == served
    assert {number: answer(repository, "m", str(number)) for number in served} == {n: n for n in served}
    assert answer(repository) == 3


@pytest.mark.parametrize(
    ("wanted", "loaded"), [((), []), (("m",), ["m"]), (("*",), ["m", "n"]), (("*", "n"), ["m", "n"])]
)
def test_explicit_mode_starts_with_what_it_is_told(
    root: Path, opened: Open, wanted: tuple[str, ...], loaded: list[str]
) -> None:
    write_model(root / "n", scaled(1))
    repository = opened(root, load_model=wanted)
    assert [version.name for version in repository] == loaded
    assert {n for n, version, state, _ in index(repository) if (version, state) == ("", "")} == {
        "m", "n",
    } - set(loaded)  # fmt: skip
    assert repository.all_ready()


def test_a_model_to_load_at_the_start_that_is_not_there_is_a_problem(root: Path, opened: Open) -> None:
    repository = opened(root, load_model=("nope",))
    assert not repository.all_ready()
    reason = "failed to load 'nope', failed to poll from model repository"
    assert ("nope", "", "UNAVAILABLE", reason) in index(repository)


def test_only_what_changed_is_loaded_again(root: Path, opened: Open) -> None:
    (root / "m" / "config.pbtxt").write_text(ALL)
    repository = opened(root, load_model=("m",))
    before = {version.version: version for version in repository}
    repository.load_model("m")
    assert {version.version: version for version in repository} == before
    write_model(root / "m", scaled(20), 2)
    (root / "m" / "3" / "model.onnx").unlink()
    (root / "m" / "3").rmdir()
    write_model(root / "m", scaled(40), 4)
    repository.load_model("m")
    assert repository.get("m", "1") is before[1]
    assert [answer(repository, "m", number) for number in ("1", "2", "4", "")] == [1, 20, 40, 40]
    with pytest.raises(UnavailableError, match="version 3 is not at ready state"):
        repository.get("m", "3")
    (root / "m" / "config.pbtxt").write_text("version_policy { all {} } max_batch_size: 2")
    repository.load_model("m")
    assert repository.get("m", "1") is not before[1]
    assert repository.get("m").config.max_batch_size == 2


def test_a_load_is_all_or_nothing(root: Path, opened: Open) -> None:
    (root / "m" / "config.pbtxt").write_text(ALL)
    repository = opened(root, load_model=("m",))
    before = list(repository)
    write_model(root / "m", scaled(10), 1)
    (root / "m" / "2" / "model.onnx").write_bytes(b"broken")
    with pytest.raises(
        InvalidArgumentError, match=r"load failed for model 'm': .*version 2 is at UNAVAILABLE"
    ):
        repository.load_model("m")
    assert list(repository) == before
    assert [answer(repository, "m", number) for number in ("1", "2", "3")] == [1, 2, 3]
    assert [state for _, _, state, _ in index(repository)] == ["READY"] * 3
    assert "no ONNX model" in index(repository)[1][3]
    assert repository.all_ready()
    write_model(root / "m", scaled(20), 2)
    repository.load_model("m")
    assert [answer(repository, "m", number) for number in ("1", "2", "3")] == [10, 20, 3]
    assert [reason for *_, reason in index(repository)] == [""] * 3


def test_a_broken_config_keeps_the_model_as_it_was(root: Path, opened: Open) -> None:
    repository = opened(root, load_model=("m",))
    (root / "m" / "config.pbtxt").write_text("max_batch_size: lots")
    with pytest.raises(InvalidArgumentError, match=r"load failed for model 'm': config.pbtxt: 1:17"):
        repository.load_model("m")
    assert answer(repository) == 3


def test_a_failed_first_load_is_remembered(root: Path, opened: Open) -> None:
    (root / "m" / "3" / "model.onnx").write_bytes(b"broken")
    repository = opened(root)
    with pytest.raises(InvalidArgumentError, match="load failed for model 'm'"):
        repository.load_model("m")
    with pytest.raises(NotFoundError, match=r"'m' has no available versions: .*no ONNX model"):
        repository.get("m")
    with pytest.raises(UnavailableError, match=r"version 3 is not at ready state: .*no ONNX model"):
        repository.get("m", "3")
    assert not repository.all_ready()
    repository.unload_model("m")
    assert repository.all_ready()


def test_an_unloaded_model_is_gone_and_can_come_back(root: Path, opened: Open) -> None:
    repository = opened(root, load_model=("m",))
    repository.unload_model("m")
    with pytest.raises(NotFoundError, match="'m' has no available versions"):
        repository.get("m")
    with pytest.raises(UnavailableError, match="version 3 is not at ready state"):
        repository.get("m", "3")
    with pytest.raises(NotFoundError, match="version 1 is not found"):
        repository.get("m", "1")
    until(lambda: index(repository) == [("m", "3", "UNAVAILABLE", "unloaded")])
    repository.unload_model("m")
    repository.unload_model("nope")
    repository.load_model("m")
    assert index(repository) == [("m", "3", "READY", "")]


def test_what_loads_for_the_first_time_is_unavailable_not_unknown(root: Path, opened: Open) -> None:
    repository = opened(root)
    repository._control._replace("m", lambda model: model.loading([3]))
    for version in ("", "3"):
        with pytest.raises(UnavailableError, match="is not at ready state"):
            repository.get("m", version)
    assert not repository.is_ready("m")
    assert index(repository) == [("m", "3", "LOADING", "")]


def test_each_change_is_told_of_one_at_a_time(root: Path, opened: Open) -> None:
    write_model(root / "n", scaled(1))
    repository = opened(root)
    inside, most, seen = 0, 0, []

    def listen() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        seen.append([(state.name, state.state) for state in repository.index()])
        inside -= 1

    repository.on_change = listen
    threads = [threading.Thread(target=repository.load_model, args=(name,)) for name in ("m", "n")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, len(seen)) == (1, 4)
    assert seen[-1] == [("m", "READY"), ("n", "READY")]


def test_a_run_in_progress_and_what_waits_finish_on_the_version_they_came_to(
    root: Path, opened: Open
) -> None:
    write_model(root / "slow", slow())
    (root / "slow" / "config.pbtxt").write_text("instance_group { count: 1 }")
    repository = opened(root, load_model=("slow",))
    core, old = InferenceCore(repository._settings, repository), repository.get("slow")

    def ask(multiplications: int, call: Call) -> Any:
        n = Tensor("n", DATATYPES["INT64"], np.array(multiplications, np.int64))
        return core.infer(InferRequest("slow", "", (n,)), call)

    running = Call()
    futures = [ask(10_000_000, running), ask(1, Call())]
    until(lambda: running.run_options is not None)
    (root / "slow" / "config.pbtxt").write_text("instance_group { count: 2 }")
    repository.load_model("slow")
    assert repository.get("slow") is not old
    assert ask(1, Call()).result(60).outputs[0].array.shape == (128, 128)
    assert not any(future.done() for future in futures)
    running.cancel()
    assert futures[1].result(60).outputs[0].array.shape == (128, 128)
    assert old.statistics.snapshot().inferences == 1


def test_a_version_that_retired_after_the_lookup_is_looked_up_again(root: Path, opened: Open) -> None:
    repository = opened(root, load_model=("m",))
    old = repository.get("m")
    write_model(root / "m", scaled(30), 3)
    repository.load_model("m")
    until(lambda: repository._control._retirement.wait("m", 0))
    looked_up = iter([old])
    get, repository.get = repository.get, lambda *key: next(looked_up, None) or get(*key)  # type: ignore[method-assign]
    assert answer(repository) == 30


def test_override_of_the_config_alone_serves_the_repositorys_files(root: Path, opened: Open) -> None:
    repository = opened(root, load_model=("m",))
    config = model_config_pb2.ModelConfig(max_batch_size=2)
    config.version_policy.specific.versions.append(1)
    repository.load_model("m", Override(config))
    assert [v.version for v in repository] == [1]
    assert repository.get("m").config.max_batch_size == 2
    assert answer(repository) == 1
    repository.load_model("m")
    assert [v.version for v in repository] == [3]
    assert repository.get("m").config.max_batch_size == 0
    with pytest.raises(InternalError, match="failed to poll"):
        repository.load_model("nope", Override(config))
    with pytest.raises(InvalidArgumentError, match="name is 'other'"):
        repository.load_model("m", Override(model_config_pb2.ModelConfig(name="other")))
    assert answer(repository) == 3


def test_override_files_are_served_alone_and_leave_nothing_behind(
    root: Path, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    graph = write_model(tmp_path / "elsewhere", scaled(70)).read_bytes()
    repository = opened(root, load_model=("m",))
    config = model_config_pb2.ModelConfig()
    for name in ("m", "new"):
        repository.load_model(name, Override(config, {(7, "model.onnx"): graph}))
        assert [version.version for version in repository.find(name)] == [7]
        assert answer(repository, name) == 70
        with pytest.raises(InvalidArgumentError, match=f"load failed for model '{name}'"):
            repository.load_model(name, Override(config, {(8, "model.onnx"): b"broken"}))
        assert answer(repository, name) == 70
    assert list(temporary.iterdir()) == []
    repository.load_model("m")
    assert answer(repository) == 3
    repository.unload_model("new")
    until(lambda: "new" not in {name for name, *_ in index(repository)})
    with pytest.raises(InternalError):
        repository.load_model("new")


def test_names_that_failed_do_not_pile_up(root: Path, opened: Open) -> None:
    repository = opened(root)
    for number in range(3):
        override = Override(model_config_pb2.ModelConfig(), {(1, "model.onnx"): b"broken"})
        with pytest.raises(InvalidArgumentError):
            repository.load_model(f"x{number}", override)
    assert repository.models == []
    assert repository._control._turns._turns == {}


@pytest.mark.parametrize("name", ["", "nope", "..", "../m", "m/../m", "/m", ".m", "m\0", "x" * 300])
def test_no_name_leads_out_of_the_repository(root: Path, opened: Open, name: str) -> None:
    write_model(root.parent / ".m", scaled(1))
    repository = opened(root)
    graph = (root / "m" / "1" / "model.onnx").read_bytes()
    with pytest.raises(InternalError, match="failed to poll from model repository"):
        repository.load_model(name)
    if name != "nope":
        with pytest.raises(InternalError, match="failed to poll from model repository"):
            repository.load_model(name, Override(model_config_pb2.ModelConfig(), {(1, "model.onnx"): graph}))
    assert repository.models == []


@pytest.mark.parametrize("file", ["3", "3/model.onnx", "config.pbtxt", "labels.txt", "3/golden.npz"])
def test_links_out_of_the_repository_are_refused(root: Path, opened: Open, file: str) -> None:
    config = 'output { name: "y" data_type: TYPE_FP32 dims: [-1, 4] label_filename: "labels.txt" }'
    (root / "m" / "config.pbtxt").write_text(config)
    (root / "m" / "labels.txt").write_text("a\nb\n")
    link, outside = root / "m" / file, root.parent / "outside"
    if link.exists():
        link.rename(outside)
    else:
        outside.write_bytes(b"")
    link.symlink_to(outside)
    repository = opened(root)
    with pytest.raises(InvalidArgumentError, match="leads outside the model repository"):
        repository.load_model("m")


@pytest.mark.parametrize("file", ["../../../outside", "/etc/hostname", "a\0b", "a//b"])
def test_names_in_a_config_do_not_lead_out_of_the_model(root: Path, opened: Open, file: str) -> None:
    repository = opened(root)
    config = model_config_pb2.ModelConfig()
    sample = config.model_warmup.add(name="one", batch_size=1)
    sample.inputs["x"].input_data_file = file
    with pytest.raises(InvalidArgumentError, match="leads outside the model's folder"):
        repository.load_model("m", Override(config))
    config.Clear()
    config.default_model_filename = file
    with pytest.raises(InvalidArgumentError, match=r"default_model_filename|is missing"):
        repository.load_model("m", Override(config))


def test_the_servers_default_batch_size_is_for_graphs_that_batch_and_configs_that_say_nothing(
    root: Path, opened: Open
) -> None:
    write_model(root / "fixed", identity([1, 3]))
    write_model(root / "stated", scaled(1))
    (root / "stated" / "config.pbtxt").write_text("max_batch_size: 2")
    setting = "onnxruntime,default-max-batch-size=8"
    repository = opened(root, mode="none", backend_config=(setting,))
    sizes = {version.name: version.config.max_batch_size for version in repository}
    assert sizes == {"fixed": 0, "m": 8, "stated": 2}


def test_links_inside_the_repository_are_followed(root: Path, opened: Open) -> None:
    (root / "m" / "3").rename(root / ".blobs")
    (root / "m" / "3").symlink_to(root / ".blobs")
    assert answer(opened(root, mode="none")) == 3


@pytest.mark.parametrize("file", ["config.pbtxt", "3/model.onnx"])
def test_what_is_no_file_holds_nobody_up(root: Path, opened: Open, file: str) -> None:
    path = root / "m" / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    repository = opened(root, mode="none")
    assert answer(repository) == 3 if file == "config.pbtxt" else not repository.all_ready()


def test_a_name_in_two_repositories_is_served_from_neither(root: Path, tmp_path: Path, opened: Open) -> None:
    write_model(tmp_path / "more" / "m", scaled(9))
    write_model(tmp_path / "more" / "n", scaled(9))
    repository = opened(root, tmp_path / "more", mode="none")
    assert [version.name for version in repository] == ["n"]
    ((name, version, state, reason), _) = index(repository)
    assert (name, version, state) == ("m", "", "UNAVAILABLE")
    assert "earlier model repository" in reason


def test_more_loads_than_may_wait_are_refused_at_once(root: Path, opened: Open) -> None:
    repository = opened(root)
    taken = repository._control._turns
    started = threading.Event()

    def load() -> None:
        started.set()
        repository.load_model("m")

    with taken.take("m"):
        threads = [threading.Thread(target=load) for _ in range(MOST_CHANGES - 1)]
        for thread in threads:
            thread.start()
        until(lambda: taken._taken == MOST_CHANGES)
        with pytest.raises(UnavailableError, match="under way or waiting"):
            repository.load_model("m")
    for thread in threads:
        thread.join(30)
    assert answer(repository) == 3


def test_after_the_close_requests_and_loads_are_unavailable(root: Path, opened: Open) -> None:
    repository = opened(root, load_model=("m",))
    repository.close()
    with pytest.raises(UnavailableError, match="stopping"):
        repository.get("m")
    with pytest.raises(UnavailableError, match="stopping"):
        repository.load_model("m")
    assert Model("m").versions == {}
