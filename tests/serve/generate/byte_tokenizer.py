"""A tokenizer with a token for each byte, so that characters are cut, and one that ends a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

EOS = 256
VOCABULARY = 257


def write_byte_tokenizer(folder: Path) -> None:
    """Write its tokenizer.json into a model version's folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<eos>"])
    built.save(str(folder / "tokenizer.json"))
