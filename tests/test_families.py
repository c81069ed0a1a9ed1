"""Every family's whole way: hardly trained, exported, served, and asked for what its network answered."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import torch

from export.__main__ import main as export
from export.recipes import graph_file
from loadtest.target import INFER_PATH
from serve.generate_client.command import main as generate
from serve.pb import grpc_service_pb2 as pb
from train.__main__ import main as train
from train.family import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer

IMAGES = "--train-rows 512 --batch-size 32"
FLAGS = {
    "mobilenet": f"{IMAGES} --width .25",
    "resnet": f"{IMAGES} --width .5",
    "simplecnn": IMAGES,
    "lstm": "--epoch-windows 640 --hidden 16",
    "gpt": "--steps-per-epoch 10 --batch-size 4 --width 32 --heads 2",
    "bert": "--train-rows 512 --batch-size 32 --width 32 --layers 1",
}
ASKED = (*FAMILIES, "lstm_step")
ENTRIES = (*ASKED, "gpt_generate")


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., RunningServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, Path]]:
    """A server with a hardly trained model of each family."""
    folder = tmp_path_factory.mktemp("families")
    threads = torch.get_num_threads()
    for family in FAMILIES:
        out = ["--out", str(folder / family)]
        assert train([family, "--recipe", "quick", "--epochs", "1", *shlex.split(FLAGS[family]), *out]) == 0
        # After a few batches int8 turns many answers around; test_quantization.py judges accuracy.
        assert export([str(folder / family), "--to", str(folder / "models"), "--tolerance", "100"]) == 0
    torch.set_num_threads(threads)
    running = serve("--model-repository", folder / "models")
    yield running, folder / "models"
    running.stop()


def test_a_model_of_each_family_and_no_other_is_there(server: tuple[RunningServer, Path]) -> None:
    assert {path.name for path in server[1].iterdir()} == set(ENTRIES)


@pytest.mark.parametrize("name", ASKED)
def test_the_server_answers_what_the_network_answered(server: tuple[RunningServer, Path], name: str) -> None:
    running, repository = server
    golden = np.load(repository / name / "1" / "golden.npz")
    default = json.loads((repository / name / "1" / "report.json").read_text())["default"]
    datatypes = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64"}
    request = pb.ModelInferRequest(model_name=name)
    for key in golden.files:
        kind, _, tensor = key.partition(".")
        if kind == "input":
            array = golden[key]
            request.inputs.add(name=tensor, datatype=datatypes[array.dtype.name], shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
    with grpc.insecure_channel(running.url) as channel:
        call = channel.unary_unary(
            INFER_PATH, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
        )
        answer = call(request, timeout=30)
    outputs = {key.partition(".")[2] for key in golden.files if key.startswith("output.")}
    assert {output.name for output in answer.outputs} == outputs
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        found = np.frombuffer(raw, np.float32).reshape(output.shape)
        off = np.abs(found - golden[f"output.{output.name}"]).max()
        # What the exporter saw on all held-out rows; another batch size moves FP32 sums by rounding.
        assert off <= golden[f"tolerance.{graph_file(default)}.{output.name}"] + 1e-4, output.name


def test_the_server_writes_with_the_graph_that_has_a_cache(
    server: tuple[RunningServer, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # In its default precision; test_exported_generation.py compares texts with torch's.
    assert generate(["gpt_generate", "ROMEO:", "--url", server[0].url, "--max-tokens", "9"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("ROMEO:")
    # A line's end is added, unless the ninth character is one.
    assert len(written) == len("ROMEO:") + 9 + (written[14] != "\n")
    assert written.endswith("\n")


@pytest.mark.parametrize("name", ["gpt", "gpt_generate", "bert"])
def test_a_language_model_has_its_tokenizer_beside_it(server: tuple[RunningServer, Path], name: str) -> None:
    assert (server[1] / name / "1" / "tokenizer.json").stat().st_size > 0
