"""Generation models and their twins in a repository: loaded, tried, asked, unloaded, without a transport."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from export.repository import golden
from serve.core import InferenceCore
from serve.errors import (
    InvalidArgumentError,
    RetiredError,
    ServeError,
    UnavailableError,
    UnsupportedError,
)
from serve.generate.twin import TwinVersion
from serve.generate.version import GenerationVersion
from serve.model.statistics import statistics_message
from serve.model_repository.repository import Repository
from serve.protocol.codec import decode_infer_request
from serve.request import Call, InferRequest, InferResponse
from serve.runtime.cores import usable_cores
from serve.settings import ServerSettings
from tests.graphs import scaled, write_model
from tests.serve.generate.conftest import (
    ALPHABET,
    DECOUPLED,
    config,
    parameter,
    write_generation_model,
    write_twin,
)
from tests.serve.generate.generation_client import ask, greedy
from train.tokenization import to_json, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Make = Callable[..., InferenceCore]

ENDLESS = 8000  # tokens: seconds


@pytest.fixture
def make() -> Iterator[Make]:
    """Cores in explicit mode, closed at the end."""
    cores: list[InferenceCore] = []

    def make(root: Path, *models: str, **settings: Any) -> InferenceCore:
        flags = ServerSettings(model_repository=(root,), model_control_mode="explicit", **settings)
        cores.append(InferenceCore(flags, Repository(flags)))
        for name in models:
            cores[-1].repository.load_model(name)
        return cores[-1]

    yield make
    for core in cores:
        core.close()


@pytest.fixture
def folder(tmp_path: Path, generation_graph: Path, character_tokenizer: bytes) -> Path:
    """A repository of one small model, gpt, to change."""
    text = config(DECOUPLED, context=256)
    write_generation_model(tmp_path / "gpt", generation_graph, text, character_tokenizer)
    return tmp_path


def decoded(model: str, **fields: Any) -> InferRequest:
    return decode_infer_request(ask(model, **fields).SerializeToString())


def text_of(response: InferResponse) -> str:
    (tensor,) = response.outputs
    text: str = tensor.array[0].decode()
    return text


def unary(core: InferenceCore, model: str, tokens: int = 5) -> str:
    request = decoded(model, text_input="abc", max_tokens=tokens, exclude_input_in_output=True)
    return text_of(core.infer(request, Call()).result(30))


def refused(load: Callable[[], Any]) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        load()
    return str(caught.value)


def expected(graph: Path, prompt: str, count: int) -> str:
    ids = greedy(graph, [ALPHABET.index(character) for character in prompt], count)
    return "".join(ALPHABET[token] for token in ids)


# Loading


def test_a_graph_with_a_cache_becomes_a_model_that_generates(
    make: Make, generation_repository: Path, generation_graph: Path
) -> None:
    core = make(generation_repository, "once")
    version = core.repository.get("once")
    assert isinstance(version, GenerationVersion)
    assert unary(core, "once") == expected(generation_graph, "abc", 5)
    assert version.config.message.backend == "onnxruntime"
    assert version.memory_bytes > 0
    assert version.placement
    assert version.properties["execution_providers"] == "CPUExecutionProvider"


def test_one_run_at_a_time_has_all_cores_and_its_threads_wait_awake(make: Make, folder: Path) -> None:
    core = make(folder, "gpt")
    settings = core.repository.get("gpt")._session.settings  # type: ignore[attr-defined] # GenerationVersion's
    assert (settings.instances, settings.intra_op_threads) == (1, usable_cores())
    spinning = {
        "session.intra_op.allow_spinning": "1",
        "session.intra_op.spin_duration_us": "20",
        "session.force_spinning_stop": "1",
    }
    assert settings.entries == spinning
    with (folder / "gpt" / "config.pbtxt").open("a") as stream:
        stream.write(parameter("session.intra_op.allow_spinning", 0))
    core.repository.load_model("gpt")
    settings = core.repository.get("gpt")._session.settings  # type: ignore[attr-defined] # as above
    assert settings.entries == {**spinning, "session.intra_op.allow_spinning": "0"}


def test_the_golden_rows_are_run(make: Make, folder: Path, generation_graph: Path) -> None:
    session = onnxruntime.InferenceSession(generation_graph)
    sizes = {"batch": 2, "time": 1, "cache": 4}
    feeds = {
        node.name: np.ones(
            [sizes.get(size, size) for size in node.shape],
            np.int64 if node.type == "tensor(int64)" else np.float32,
        )
        for node in session.get_inputs()
    }
    logits = session.run(["logits"], feeds)[0]
    path = folder / "gpt" / "1" / "golden.npz"
    path.write_bytes(golden(feeds, {"logits": logits}, {"model.onnx": {"logits": 0.0}}))
    core = make(folder, "gpt")
    assert core.repository.is_ready("gpt")
    path.write_bytes(golden(feeds, {"logits": logits + 1}, {"model.onnx": {"logits": 0.0}}))
    assert "output 'logits' of model.onnx is off by 1" in refused(lambda: core.repository.load_model("gpt"))
    assert core.repository.is_ready("gpt")


def test_a_tokenizer_that_is_not_the_exporter_s_is_refused(make: Make, folder: Path) -> None:
    version = folder / "gpt" / "1"
    digests = {
        f"1/{name}": hashlib.sha256((version / name).read_bytes()).hexdigest()
        for name in ("model.onnx", "tokenizer.json")
    }
    (version / "report.json").write_text(json.dumps({"sha256": digests}))
    core = make(folder, "gpt")
    tokenizer = version / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    assert "tokenizer.json is not the file that was exported" in refused(
        lambda: core.repository.load_model("gpt")
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (parameter("past_length", "nowhere"), "no input 'nowhere'"),
        (parameter("kv_cache_memory_bytes", 1000), "'kv_cache_memory_bytes' is 1000"),
        ("instance_group { count: 2 }", "instance_group.count is 2"),
        (parameter("eos_token_id", "3,256"), "'eos_token_id' has 256, expected 0 to 255"),
        (parameter("past_present_share_buffer", "maybe"), "'maybe', expected true or false"),
        ('input { name: "prompt" data_type: TYPE_STRING dims: 1 }', "no input 'prompt'"),
        ('model_warmup { name: "x" }', "model_warmup"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    make: Make, folder: Path, more: str, message: str
) -> None:
    with (folder / "gpt" / "config.pbtxt").open("a") as stream:
        stream.write(more)
    core = make(folder)
    assert message in refused(lambda: core.repository.load_model("gpt"))
    (state,) = core.repository.index()
    assert (state.state, message in state.reason) == ("UNAVAILABLE", True)


def test_a_damaged_tokenizer_is_refused(make: Make, folder: Path) -> None:
    path = folder / "gpt" / "1" / "tokenizer.json"
    path.write_text("{}")
    assert "tokenizer.json" in refused(lambda: make(folder, "gpt"))
    path.unlink()
    path.mkdir()
    assert "tokenizer.json: expected a file" in refused(lambda: make(folder, "gpt"))


def test_another_model_s_tokenizer_is_named(
    make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = to_json(train_tokenizer("char", (ALPHABET + "가나",), 0))
    (folder / "gpt" / "1" / "tokenizer.json").write_bytes(more)
    core = make(folder, "gpt")
    assert "2 tokens that only tokenizer.json has" in caplog.text
    assert "2 tokens that only tokenizer.json has" in core.repository.get("gpt").properties["batching"]


def test_a_graph_that_nobody_vouches_for_is_tried_in_a_process_of_its_own(
    make: Make, folder: Path, generation_graph: Path
) -> None:
    write_generation_model(
        folder / "large",
        generation_graph,
        config(parameter("max_num_seqs", 1), parameter("kv_cache_memory_bytes", 2**40), context=2**21),
        None,
    )
    core = make(folder, "gpt", untrusted_repository=True, untrusted_memory_mb=256)
    assert core.repository.is_ready("gpt")
    assert "used more than 256 MB" in refused(lambda: core.repository.load_model("large"))


# Requests


def test_a_stream_s_answers_but_the_last_are_emitted(
    make: Make, folder: Path, generation_graph: Path
) -> None:
    core = make(folder, "gpt")
    emitted: list[InferResponse] = []
    request = decoded("gpt", text_input="abc", max_tokens=5, stream=True)
    last = core.infer(request, Call(), emit=emitted.append).result(30)
    texts = [text_of(response) for response in [*emitted, last]]
    assert texts == list(expected(generation_graph, "abc", 5))
    final = [response.parameters["triton_final_response"] for response in [*emitted, last]]
    assert final == [False] * 4 + [True]
    with pytest.raises(UnsupportedError, match="decoupled transaction policy"):
        core.infer(request, Call())


def test_failures_are_counted_by_their_reasons(make: Make, generation_repository: Path) -> None:
    core = make(generation_repository, "small")
    statistics = core.repository.get("small").statistics
    with pytest.raises(InvalidArgumentError):
        core.infer(decoded("small", text_input=""), Call(), emit=print)
    first, ready = [], threading.Event()

    def emit(response: InferResponse) -> None:
        first.append(response)
        ready.set()

    endless = {"text_input": "a", "max_tokens": ENDLESS, "stream": True, "ignore_eos": True}
    call = Call()
    future = core.infer(decoded("small", **endless), call, emit=emit)
    assert ready.wait(30)
    late = Call(deadline=0.0)
    with pytest.raises(ServeError, match="deadline"):
        core.infer(decoded("small", **endless), late, emit=print).result(30)
    call.cancel()
    with pytest.raises(CancelledError):
        future.result(30)
    core.repository.get("small").close()
    found = statistics.snapshot().failure
    assert found == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 0, "OTHER": 1}


def test_executions_are_steps_and_waiting_is_queue_time(make: Make, folder: Path) -> None:
    limits = parameter("max_num_seqs", 1) + parameter("enable_prefix_caching", "false")
    (folder / "gpt" / "config.pbtxt").write_text(config(limits, context=256))
    core = make(folder, "gpt")
    requests = [decoded("gpt", text_input="abc", max_tokens=100) for _ in range(3)]
    for future in [core.infer(request, Call()) for request in requests]:
        future.result(30)
    counts = core.repository.get("gpt").statistics.snapshot()
    assert (counts.inferences, counts.executions) == (3, 300)
    running_ns = sum(compute.infer_ns for compute in counts.batches.values())
    assert counts.queue_ns > running_ns / 2  # the second waits for the first, the third for both


def test_closing_completes_what_was_begun(make: Make, folder: Path, generation_graph: Path) -> None:
    core = make(folder, "gpt")
    version = core.repository.get("gpt")
    emitted: list[InferResponse] = []
    request = decoded("gpt", text_input="abc", max_tokens=200, stream=True)
    future = version.submit(request, Call(), inline=False, emit=emitted.append)
    version.close()
    assert future.done()
    text = "".join(text_of(response) for response in [*emitted, future.result()])
    assert text == expected(generation_graph, "abc", 200)
    with pytest.raises(RetiredError):
        version.submit(request, Call(), inline=False, emit=print)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpt/")]


def test_a_model_may_be_loaded_and_unloaded_again_and_again(make: Make, folder: Path) -> None:
    core = make(folder)
    before = threading.active_count()
    for _ in range(3):
        core.repository.load_model("gpt")
        core.repository.unload_model("gpt")
    core.repository.load_model("gpt")
    assert threading.active_count() <= before + 2  # its engine, and the last retirement


# Twins


def test_a_twin_answers_with_its_model_s_weights(make: Make, folder: Path, generation_graph: Path) -> None:
    write_twin(folder / "twin", "gpt")
    core = make(folder, "twin")
    with pytest.raises(UnavailableError, match="'gpt', which is not loaded: load it"):
        unary(core, "twin")
    core.repository.load_model("gpt")
    assert unary(core, "twin") == expected(generation_graph, "abc", 5)
    twin, model = core.repository.get("twin"), core.repository.get("gpt")
    assert isinstance(twin, TwinVersion)
    assert twin.memory_bytes == 0
    assert (twin.config.inputs, twin.config.outputs) == (model.config.inputs, model.config.outputs)
    asked = statistics_message("twin", 1, twin.statistics.snapshot())
    ran = statistics_message("gpt", 1, model.statistics.snapshot())
    assert (asked.inference_count, asked.execution_count) == (1, 0)
    assert ran.inference_count == 0
    assert ran.execution_count >= 5
    core.repository.unload_model("gpt")
    with pytest.raises(UnavailableError):
        unary(core, "twin")
    core.repository.load_model("gpt")
    assert unary(core, "twin") == expected(generation_graph, "abc", 5)


def test_a_twin_of_a_model_without_a_tokenizer_takes_ids(
    make: Make, generation_repository: Path, tmp_path: Path
) -> None:
    shutil.copytree(generation_repository / "ids", tmp_path / "ids")
    write_twin(tmp_path / "twin", "ids")
    core = make(tmp_path, "twin")
    assert "text_input" in core.repository.get("twin").config.inputs
    core.repository.load_model("ids")
    assert "text_input" not in core.repository.get("twin").config.inputs


def test_a_twin_needs_no_version_folder(make: Make, folder: Path) -> None:
    write_twin(folder / "twin", "gpt")
    (folder / "twin" / "1").rmdir()
    core = make(folder, "twin", "gpt")
    assert unary(core, "twin")


def test_a_twin_needs_a_model_that_generates(make: Make, folder: Path) -> None:
    write_twin(folder / "itself", "itself")
    write_twin(folder / "second", "first")
    write_twin(folder / "first", "graph")
    write_model(folder / "graph", scaled(1))
    core = make(folder, "second", "first")
    assert "expected the name of a model that generates" in refused(
        lambda: core.repository.load_model("itself")
    )
    with pytest.raises(InvalidArgumentError, match="'first', which is no model that generates"):
        unary(core, "second")
    core.repository.load_model("graph")
    with pytest.raises(InvalidArgumentError, match="'graph', which is no model that generates"):
        unary(core, "first")
    core.repository.unload_model("second")
    assert "expected the name of a model that generates" in refused(
        lambda: core.repository.load_model("second")
    )
