"""WordPiece: words as their beginnings and "##" pieces, of a vocabulary learned from the training texts.

Schuster, Nakajima, "Japanese and Korean Voice Search", ICASSP 2012; with the five special tokens of Devlin et
al., arXiv:1810.04805. Pieces are learned as in byte-pair encoding, by the library `tokenizers`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))
PREFIX = "##"


def train_wordpiece(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Learn a vocabulary; the same texts give the same tokenizer, byte for byte.

    Text is put into Unicode form C and lower case. Accents stay: what takes them off also splits a Korean
    syllable into its letters.

    Args:
        texts: what to learn from.
        vocabulary: largest number of pieces, special tokens included. A quarter is left to single characters,
            the most frequent ones; a word with any other character becomes [UNK].
    """
    tokenizer = _empty(WordPiece(unk_token=SPECIAL_TOKENS[UNKNOWN]))
    words = Counter(word for text in texts for word in _words(tokenizer, text))
    rare = _rare_characters(words, vocabulary // 4)
    kept = {word: count for word, count in words.items() if rare.isdisjoint(word)}
    # The trainer numbers the pieces it finds first in the order of a hash map, another one in each process,
    # and breaks ties by number. Pieces that it is given keep their places.
    inner = sorted({PREFIX + character for word in kept for character in word[1:]})
    trainer = WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL_TOKENS, *inner], show_progress=False
    )
    tokenizer.train_from_iterator((f"{word} " * count for word, count in kept.items()), trainer)
    return _finished(tokenizer.get_vocab(with_added_tokens=True))


def encode(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[np.ndarray]:
    """Token ids of each text between [CLS] and [SEP], INT64 [length], cut to `context`; no padding."""
    tokenizer.enable_truncation(context)
    encodings = tokenizer.encode_batch_fast(list(texts))
    tokenizer.no_truncation()
    return [np.array(encoding.ids, np.int64) for encoding in encodings]


def _empty(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False, lowercase=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    assert tokenizer.normalizer is not None
    assert tokenizer.pre_tokenizer is not None
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def _rare_characters(words: Counter[str], kept: int) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return set(sorted(counts, key=lambda character: (-counts[character], character))[kept:])


def _finished(pieces: dict[str, int]) -> Tokenizer:
    """A tokenizer of these pieces, of which only the real special tokens are special."""
    tokenizer = _empty(WordPiece(pieces, unk_token=SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    cls, sep = SPECIAL_TOKENS[CLS], SPECIAL_TOKENS[SEP]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, CLS), (sep, SEP)],
    )
    return tokenizer
