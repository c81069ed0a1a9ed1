"""`onnxedge generate`: let a model write on from a prompt, and show the text as it comes."""

from __future__ import annotations

import argparse
import codecs
import os
import signal
import sys
from typing import TYPE_CHECKING

import grpc

from serve.client_connection import add_connection_flags, check_connection, describe, open_channel
from serve.errors import ServeError
from serve.generate_client.call import Connection, ask, find_model, streams
from serve.generate_client.messages import GenerateError, Question, make_request, read_answer
from serve.generate_client.screen import Screen, Statistics
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Sequence

# Those of `python -m train sample`: the model's own distribution, a little sharper and without its tail.
MAX_TOKENS, TEMPERATURE, TOP_P = 128, 0.8, 0.95
_FLAGS = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
_TIMEOUT = 300.0
_BY_SIGNAL = 128  # and its number: a shell's status of a program that a signal ended


def main(arguments: Sequence[str]) -> int:
    """Print what a model writes; the exit status."""
    options = parse(arguments)
    screen = Screen()
    try:
        with open_channel(options) as channel:
            generate(Connection(GRPCInferenceServiceStub(channel), options), options, screen)
    except KeyboardInterrupt:
        screen.leave()
        return _BY_SIGNAL + signal.SIGINT
    except BrokenPipeError:  # as of `| head`
        screen.leave()
        return _BY_SIGNAL + signal.SIGPIPE
    except grpc.RpcError as error:
        return _failed(describe(error, options), screen)
    except (GenerateError, ServeError, OSError) as error:
        return _failed(str(error), screen)
    return 0


def _failed(message: str, screen: Screen) -> int:
    screen.leave()
    print(f"onnxedge generate: {message}", file=sys.stderr)
    return 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's flags; ends the process where they are none, or there is no prompt."""
    parser = argparse.ArgumentParser(prog="onnxedge generate", description=__doc__)
    parser.add_argument("model", help="the model's name")
    parser.add_argument("prompt", nargs="?", help="what to go on from; -, or none: the standard input")
    parser.add_argument("--ids", action="store_true", help="prompt and answer are token ids: '18 47 56'")
    parser.add_argument(
        "--echo", action=argparse.BooleanOptionalAction, default=True, help="print the prompt, too (default)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="say how many tokens there were, and how fast, on stderr"
    )
    _add_sampling_flags(parser)
    add_connection_flags(parser, timeout=_TIMEOUT)
    options = parser.parse_intermixed_args(arguments)  # the prompt may come after flags
    if options.prompt is None and sys.stdin.isatty():
        parser.error("give a prompt, or pipe one in")
    return check_connection(parser, options)


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "What isn't given and has no default here is the server's.")
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="INT",
        help=f"how many to write at most (default: {MAX_TOKENS}, or what a shorter context leaves)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="FLOAT",
        help=f"divides the logits; 0 takes the most probable token always (default: {TEMPERATURE})",
    )
    group.add_argument("--top-k", type=int, metavar="INT", help="draw from so many most probable tokens")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="FLOAT",
        help=f"draw from the fewest tokens that have this probability together; 1 is all (default: {TOP_P})",
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="FLOAT", help="above 1: less of what was there before"
    )
    group.add_argument("--seed", type=int, metavar="INT", help="of the draws, to have the same ones again")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this; may be given more than once"
    )


def generate(connection: Connection, options: argparse.Namespace, screen: Screen) -> None:
    """Ask, and print the answer.

    Raises:
        GenerateError: the prompt can't be read, the model can't be asked this, or it failed.
        grpc.RpcError: the server can't be reached, or refused.
    """
    model, prompt = _as_utf8("the model's name", options.model), read_prompt(options)
    metadata = find_model(connection, model)
    question = make_question(options, prompt, metadata.properties.get("context_length", ""))
    stream = streams(connection, model)
    request = make_request(metadata, question, stream=stream)
    request.model_version = options.version
    shown = prompt if isinstance(prompt, str) else _as_text(prompt)
    before = shown if options.echo else ""  # with the first answer: a refused prompt isn't one
    statistics = Statistics()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # of servers that tear characters
    for answer in map(read_answer, ask(connection, request, stream=stream)):
        statistics.add(answer)
        screen.write(before + decoder.decode(answer.text) + _as_text(answer.ids))
        before = ""
    screen.write(decoder.decode(b"", final=True))
    screen.end_line()
    if options.stats:
        print(f"onnxedge generate: {statistics}", file=sys.stderr)


def _as_text(ids: Sequence[int]) -> str:
    return "".join(f"{token} " for token in ids)


def read_prompt(options: argparse.Namespace) -> str | list[int]:
    """The prompt of the command line or of the standard input, as it is; with --ids its numbers.

    Raises:
        GenerateError: it is neither UTF-8 nor numbers.
    """
    from_stdin = options.prompt in (None, "-")
    text = _as_utf8("the prompt", sys.stdin.buffer.read() if from_stdin else options.prompt)
    if not options.ids:
        return text
    try:
        return [int(number) for number in text.replace(",", " ").split()]
    except ValueError as error:
        raise GenerateError("with --ids the prompt is token ids, such as '18 47 56'") from error


def _as_utf8(what: str, given: str | bytes) -> str:
    """The text that bytes, or those of an argument, are in UTF-8, whatever the locale's encoding is."""
    try:
        return os.fsencode(given).decode()
    except UnicodeError as error:
        detail = f": {error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise GenerateError(f"{what} is not UTF-8{detail}") from error


def make_question(options: argparse.Namespace, prompt: str | list[int], context: str) -> Question:
    """What the flags ask for.

    Args:
        options: as `parse` answers.
        prompt: as `read_prompt` answers.
        context: how many tokens prompt and answer may have together; empty: the model doesn't say.

    Raises:
        GenerateError: a stop is not UTF-8.
    """
    given = {name: value for name in _FLAGS if (value := getattr(options, name)) is not None}
    if "stop" in given:
        given["stop"] = [_as_utf8("--stop", text) for text in given["stop"]]
    most = min(MAX_TOKENS, _room(prompt, int(context))) if context.isdecimal() else MAX_TOKENS
    sampling = {"max_tokens": most, "temperature": TEMPERATURE, "top_p": TOP_P, **given}
    return Question(prompt, sampling, required=frozenset(given), counts=options.stats)


def _room(prompt: str | list[int], context: int) -> int:
    """Tokens that fit behind a prompt.

    How many a text has, the server alone knows; as many as bytes at most, and mostly a quarter of that. It is
    only taken for so long where there is no room for the default behind any prompt.
    """
    if isinstance(prompt, str) and context > MAX_TOKENS:
        return MAX_TOKENS
    length = len(prompt.encode(errors="replace")) if isinstance(prompt, str) else len(prompt)
    return max(1, context - length)
