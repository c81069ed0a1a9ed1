"""One loaded graph with a cache → a version that generates, tried on the way."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve.admission import memory_limit
from serve.generate.decoder_graph import DecoderGraph
from serve.generate.generation_config import generation_settings
from serve.generate.probe import probe
from serve.generate.runner import Runner
from serve.generate.scheduler import GenerationScheduler
from serve.generate.tensors import generation_model_config
from serve.generate.tokenizer import Tokenizer
from serve.generate.version import GenerationVersion
from serve.loading import golden
from serve.pb import model_config_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from serve.generate.settings import GenerationSettings
    from serve.model.model_config import ModelConfig
    from serve.runtime.session import Session, SessionSettings

logger = logging.getLogger(__name__)

# Threads that wait for a token's next operator by spinning, and stop with the run, so that a model without
# requests burns nothing: 2.4 ms a token instead of 2.9 (GPT-2 small in 4 bits, two cores).
_ENTRIES = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}


@dataclass(frozen=True, slots=True)
class _Tried:
    """A graph that generates here."""

    config: ModelConfig
    settings: GenerationSettings
    tokenizer: Tokenizer | None
    runner: Runner
    findings: tuple[str, ...]


def one_instance(message: pb.ModelConfig, name: str) -> pb.ModelConfig:
    """A copy of a generation model's config for one run at a time, which all cores share."""
    completed = pb.ModelConfig()
    completed.CopyFrom(message)
    if not completed.instance_group:
        completed.instance_group.add(name=name, kind="KIND_AUTO")
    del completed.instance_group[1:]
    completed.instance_group[0].count = 1
    return completed


def generation_session(wanted: SessionSettings) -> SessionSettings:
    """How such a graph is to be run; what the config says of it stays."""
    return replace(wanted, entries={**_ENTRIES, **wanted.entries})


def load_generation(number: int, message: pb.ModelConfig, session: Session, path: Path) -> GenerationVersion:
    """Try a graph, and serve it.

    Args:
        number: the version's.
        message: its config, of one instance.
        session: the graph, which the version's `close` closes.
        path: the graph's; the tokenizer and the golden samples are beside it.

    Raises:
        ModelLoadError: the config, the graph and the tokenizer don't fit together, or the graph computes
            something else than it should.
    """
    tried = _try(message, session, path)
    try:
        return GenerationVersion(
            number,
            tried.config,
            tried.settings,
            session=session,
            runner=tried.runner,
            scheduler=GenerationScheduler(tried.settings, adjacent_rows=tried.runner.adjacent_rows),
            tokenizer=tried.tokenizer,
            findings=tried.findings,
        )
    except Exception:
        tried.runner.close()
        raise


def try_generation(message: pb.ModelConfig, session: Session, path: Path) -> None:
    """What `load_generation` does before it serves, with a cache for one sequence; see there."""
    smallest = pb.ModelConfig()
    smallest.CopyFrom(message)
    smallest.parameters["max_num_seqs"].string_value = "1"
    _try(smallest, session, path).runner.close()


def _try(message: pb.ModelConfig, session: Session, path: Path) -> _Tried:
    name = path.parent.parent.name
    graph = DecoderGraph.from_config(message, session.inputs, session.outputs)
    tokenizer = Tokenizer.load(path.parent)
    config = generation_model_config(message, name, has_tokenizer=tokenizer is not None)
    golden.check(session, config, path.parent, path.name)
    settings = generation_settings(
        message,
        cache_length=graph.cache_length,
        bytes_per_token=graph.bytes_per_token,
        memory_limit=memory_limit(),
    )
    runner = Runner(session, graph, settings)
    try:
        findings = probe(runner)
    except Exception:
        runner.close()
        raise
    for finding in findings:
        logger.warning("'%s': %s", name, finding)
    return _Tried(config, settings, tokenizer, runner, findings)
