"""One loaded graph with a cache → a version that generates, tried on the way."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve.admission import memory_limit
from serve.errors import ModelLoadError
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

# Threads wait for a token's next operator by spinning, which ends with the run, so that a model without
# requests burns nothing; and never for long, because a thread that it waits for may be waiting for its core.
# ms a token on two cores, alone and beside two busy processes (GPT-2 small in 4 bits; in 8 bits): without
# spinning 3.2, 4.5 (4.6, 6.1), for 20 us 2.7, 5.4 (3.9, 7.2), as onnxruntime does it 2.7, 8.0 (4.0, 10.3).
_ENTRIES = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "20",
    "session.force_spinning_stop": "1",
}


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
        _check_tokens(settings, runner.vocabulary)
        findings = probe(runner)
        if tokenizer is not None and tokenizer.vocabulary > runner.vocabulary:
            more = tokenizer.vocabulary - runner.vocabulary
            findings += (f"prompts with {more} tokens that only tokenizer.json has are refused",)
    except Exception:
        runner.close()
        raise
    for finding in findings:
        logger.warning("'%s': %s", name, finding)
    logger.info(
        "'%s': up to %d texts at a time, %d tokens each, %d together, %d bytes of cache a token",
        name,
        settings.max_num_seqs,
        settings.context_length,
        settings.cache_tokens,
        graph.bytes_per_token,
    )
    return _Tried(config, settings, tokenizer, runner, findings)


def _check_tokens(settings: GenerationSettings, vocabulary: int) -> None:
    wrong = sorted(token for token in settings.eos_token_ids if token >= vocabulary)
    if wrong:
        raise ModelLoadError(
            f"config.pbtxt: parameter 'eos_token_id' has {wrong[0]}, expected 0 to {vocabulary - 1}, as the "
            "graph has tokens"
        )
