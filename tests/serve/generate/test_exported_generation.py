"""What the exporter makes of a GPT, served: it writes what the network in torch writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from export.pipeline import export
from export.settings import ExportSettings
from export.source import Source
from serve.generate_client.command import main
from tests.language_model import CONTEXT, language_model
from tests.serve.generate.generation_client import Stream, ask, output, stub_of
from train.data.tinyshakespeare import load_sample
from train.gpt_serving import language_graphs
from train.tokenization import encode, from_json, to_json, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

LENGTHS = (1, 7, 30, 90, 151)
TOKENS = 100


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return to_json(train_tokenizer("char", (load_sample().train[:60_000],), 0))  # as `language_model` has it


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., RunningServer], tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes
) -> Iterator[RunningServer]:
    model = language_model()
    graphs = language_graphs(model.network, model.fitted, model.test)
    repository = tmp_path_factory.mktemp("exported") / "models"
    source = Source("gpt", graphs[1:], {}, {"tokenizer.json": tokenizer})
    export(source, ExportSettings(repository, "x86", ("fp32",)), lambda _: None)
    running = serve("--model-repository", repository)
    yield running
    running.stop()


@torch.no_grad()
def written_by_torch(prompt: list[int], tokens: int) -> list[int]:
    """Greedily, from the whole text each time."""
    ids = torch.tensor([prompt])
    for _ in range(tokens):
        ids = torch.cat([ids, language_model().network(ids)[:, -1].argmax()[None, None]], dim=1)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


def prompts() -> list[list[int]]:
    return [language_model().test[100 * row :][:length].tolist() for row, length in enumerate(LENGTHS)]


def test_greedy_tokens_are_torchs_whoever_else_is_served(server: RunningServer) -> None:
    channel, stub = stub_of(server.url)

    def write(prompt: list[int]) -> list[int]:
        with Stream(stub, ask("gpt_generate", input_ids=prompt, max_tokens=TOKENS, stream=True)) as stream:
            return [token for response in stream for token in output(response, "output_ids")]

    with channel, ThreadPoolExecutor(len(LENGTHS)) as clients:
        found = list(clients.map(write, prompts()))
    for prompt, ids in zip(prompts(), found, strict=True):
        assert ids == written_by_torch(prompt, TOKENS)
        assert len(set(ids)) > 2  # not one letter for ever


def test_the_command_shows_the_text(
    server: RunningServer, tokenizer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "ROMEO:\n"
    prompt = encode(from_json(tokenizer), text).tolist()
    assert main(["gpt_generate", text, "--url", server.url, "--temperature=0", f"--max-tokens={TOKENS}"]) == 0
    expected = text + from_json(tokenizer).decode(written_by_torch(prompt, TOKENS))
    assert capsys.readouterr().out == expected + ("" if expected.endswith("\n") else "\n")


def test_the_servers_limit_is_the_networks(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt_generate", "a", "--url", server.url, f"--max-tokens={CONTEXT}"]) == 1
    assert f"{CONTEXT} at most (context_length)" in capsys.readouterr().err
