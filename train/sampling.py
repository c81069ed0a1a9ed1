"""`python -m train sample CHECKPOINT --prompt TEXT`: let a trained GPT write on from a prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers.decoders import DecodeStream

from train.checkpoint import TOKENIZER, CheckpointError, load_checkpoint
from train.flags import FlagParser
from train.tokenization import encode, from_json
from train.transformer import GPT

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Print the prompt and what the model writes after it, token by token.

    Returns:
        The exit code, 0. Wrong arguments exit with 2.

    Raises:
        CheckpointError: the folder is no checkpoint of a GPT that models language.
    """
    parser = make_parser()
    parsed = parser.parse(arguments)
    require_ranges(parser, parsed)
    model, tokenizer = load_writer(parsed.checkpoint)
    try:
        ids = encode(tokenizer, parsed.prompt).tolist()
    except ValueError as error:
        parser.error(f"--prompt: {error}")
    written = sample(
        model,
        ids,
        tokens=parsed.tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        generator=torch.Generator().manual_seed(parsed.seed),
    )
    print(parsed.prompt, end="", flush=True)
    # A character may take several tokens: the stream holds them back until it is whole.
    stream = DecodeStream(ids=[], skip_special_tokens=False)
    for token in written:
        print(stream.step(tokenizer, token) or "", end="", flush=True)
    print()
    return 0


def make_parser() -> FlagParser:
    """The parser of this command."""
    parser = FlagParser(prog="python -m train sample", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a trained GPT")
    parser.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="what to go on from (default: a line end)"
    )
    parser.add_argument(
        "--tokens", type=int, default=300, metavar="INT", help="how many to write (default: 300)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="FLOAT",
        help="divides the logits; 0 takes the most probable token always (default: 0.8)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="INT",
        help="draw from so many most probable tokens; 0 is all (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="FLOAT",
        help="draw from the fewest tokens that have this probability together; 1 is all (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of the draws (default: 0)")
    return parser


def require_ranges(parser: FlagParser, parsed: argparse.Namespace) -> None:
    """Exit with code 2 and a message where a flag is out of range."""
    for name, holds, expected in (
        ("prompt", parsed.prompt, "at least one character"),
        ("tokens", parsed.tokens >= 1, "at least 1"),
        ("temperature", 0 <= parsed.temperature < math.inf, "at least 0"),
        ("top_k", parsed.top_k >= 0, "at least 0"),
        ("top_p", 0 < parsed.top_p <= 1, "above 0, at most 1"),
        ("seed", 0 <= parsed.seed < 2**63, "from 0 to below 2^63"),
    ):
        if not holds:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected {expected}, got {getattr(parsed, name)!r}")


def load_writer(folder: Path) -> tuple[GPT, Tokenizer]:
    """A checkpoint's network, in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: the folder is no checkpoint of a GPT that models language.
    """
    checkpoint = load_checkpoint(folder, family="gpt")
    if not isinstance(checkpoint.model, GPT):
        raise CheckpointError(f"{folder}: a classifier's checkpoint; only a language model can write")
    return checkpoint.model, from_json(checkpoint.files[TOKENIZER])


@torch.no_grad()
def sample(
    model: GPT,
    ids: Sequence[int],
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Write token after token.

    Args:
        model: in evaluation mode, on the CPU; sees the last `context` tokens.
        ids: of the prompt, at least one.
        tokens: how many to write.
        temperature: the logits are divided by it; 0 takes the most probable token always.
        top_k: draw from so many most probable tokens; 0 is all.
        top_p: draw from the fewest most probable tokens that have this probability together; 1 is all.
        generator: the only source of randomness, on the CPU.

    Yields:
        A token id at a time.
    """
    seen = list(ids)
    for _ in range(tokens):
        seen = seen[-model.context :]
        logits = model(torch.tensor([seen]))[0, -1].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            kept = filter_logits((logits - logits.max()) / temperature, top_k=top_k, top_p=top_p)
            token = int(torch.multinomial(kept.softmax(dim=0), 1, generator=generator))
        seen.append(token)
        yield token


def filter_logits(logits: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Take improbable tokens out of the draw; first by `top_k`, then by `top_p` among those left.

    Args:
        logits: FP32 [vocabulary].
        top_k: keep so many most probable tokens; 0 is all.
        top_p: keep the fewest most probable tokens whose probabilities add up to at least this: nucleus
            sampling, Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020,
            arXiv:1904.09751; 1 is all.

    Returns:
        FP32 [vocabulary], minus infinity for what was taken out; the most probable token always stays.
    """
    ranked, order = logits.sort(descending=True, stable=True)
    if 0 < top_k < len(ranked):
        ranked[top_k:] = -math.inf
    if top_p < 1:
        probabilities = ranked.softmax(dim=0)
        before = probabilities.cumsum(dim=0) - probabilities
        ranked[before >= top_p] = -math.inf
    return torch.empty_like(logits).scatter_(0, order, ranked)
