"""Tokenizers of every kind, trained here: text comes token by token as it does all at once."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from serve.errors import InternalError, InvalidArgumentError, ModelLoadError
from serve.generate.tokenizer import IncrementalDetokenizer, Tokenizer
from train.tokenization import to_json, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXTS = [
    "The quick brown fox doesn't jump; it's 3.14 o'clock, isn't it?\n\n",
    "  두 줄의 한국어 문장입니다. 안녕하세요, 반갑습니다!\r\n\t",
    "Émile naïvely ate 3 crêpes for 5 € – \N{REPLACEMENT CHARACTER} and a half.",
    "👍🏽 👩‍👩‍👧‍👦 🇰🇷 😀😃 한글과 emoji",
]
UNKNOWN = "<unk>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PIECES = [
    *TEXTS,
    "한",
    "국",
    "😀",
    "👩‍👩‍👧‍👦",
    "🇰🇷",
    "é",
    "e\u0301",
    " ",
    "  ",
    "\n",
    ".",
    "'s",
    "x",
    "the",
    "\u200d",
    "\x00",
]
SOME_TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)


def byte_level() -> Library:
    """As GPT-2's, with tokens that were added: one like a byte's character, one of spaces, a special one."""
    library = train_tokenizer("bpe", TEXTS, 320)
    library.add_tokens(["é", "    ", "<|tool|>"])
    library.add_special_tokens(["<|end|>"])
    return library


def byte_fallback() -> Library:
    """As Llama's: spaces are visible, what the vocabulary doesn't have is written in bytes."""
    words = ["▁", "▁the", "▁fox", "▁한", "국", "x", "e", "t", "h", "f", "o", "▁e", ".", "'", "s", REPLACEMENT]
    tokens = [UNKNOWN, "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    library = Library(
        models.BPE({token: n for n, token in enumerate(tokens)}, [], unk_token=UNKNOWN, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    library.add_special_tokens([UNKNOWN, "<s>", "</s>"])
    return library


def metaspace() -> Library:
    """As SentencePiece's unigrams."""
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[UNKNOWN, "</s>"], unk_token=UNKNOWN, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


def word_piece() -> Library:
    """As BERT's."""
    library = Library(models.WordPiece(unk_token=UNKNOWN))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=[UNKNOWN, "[SEP]"], show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


def word_ends() -> Library:
    """As the first GPT's: a mark where a word ends."""
    library = Library(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=[UNKNOWN], end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


def characters() -> Library:
    return train_tokenizer("char", TEXTS, 0)


def words() -> Library:
    """Without a decoder."""
    library = Library(models.WordLevel(unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(
        TEXTS, trainers.WordLevelTrainer(special_tokens=[UNKNOWN], show_progress=False)
    )
    return library


def bytes_and_more() -> Library:
    """Bytes, and a decoder that changes what they make."""
    library = byte_level()
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("@", " at ")])
    return library


KINDS = [byte_level, byte_fallback, metaspace, word_piece, word_ends, characters, words, bytes_and_more]
# What makes text of any bytes.
OF_BYTES = [byte_level, byte_fallback, bytes_and_more]


@cache
def tokenizer_of(kind: Callable[[], Library]) -> Tokenizer:
    return Tokenizer(kind())


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> tuple[list[str], str]:
    """What each token showed, and all of it."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    shown = [detokenizer.push(token) for token in ids]
    return shown, "".join(shown) + detokenizer.flush()


def after(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of tokens where they stand."""
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), prompt=SOME_TEXT, text=SOME_TEXT)
@settings(max_examples=60, deadline=None)
def test_text_comes_token_by_token_as_all_at_once(
    kind: Callable[[], Library], data: st.DataObject, prompt: str, text: str
) -> None:
    tokenizer = tokenizer_of(kind)
    if kind is characters:
        known = set("".join(TEXTS))
        prompt, text = ("".join(c for c in part if c in known) for part in (prompt, text))
    ids = tokenizer.encode(prompt + text)
    cut = data.draw(st.integers(0, len(ids)))
    # A prompt that ends in half a character has a test of its own.
    while cut and tokenizer.decode(ids[:cut]).endswith(REPLACEMENT):
        cut -= 1
    shown, text = streamed(tokenizer, ids[:cut], ids[cut:])
    assert text == after(tokenizer, ids[:cut], ids[cut:])
    so_far = ""
    for count, new in enumerate(shown, cut + 1):
        so_far += new
        assert text.startswith(so_far), "never half a character"
        complete = after(tokenizer, ids[:cut], ids[cut:count]).rstrip(f" {REPLACEMENT}")
        assert len(so_far) >= len(complete), "nothing waits that is complete"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_come_one_by_one_as_all_at_once(kind: Callable[[], Library], data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("the fox" if kind is not characters else "fox")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary + 5), max_size=40))
    shown, text = streamed(tokenizer, prompt, ids)
    if kind is byte_fallback:
        assert text == by_bytes(ids)
    else:
        assert text == after(tokenizer, prompt, ids)
    if kind not in (byte_level, bytes_and_more):
        return
    for count in range(len(ids)):
        held = len(after(tokenizer, prompt, ids[:count])) - len("".join(shown[:count]))
        assert held in (0, 1), "what is no character doesn't wait for ever"


def by_bytes(ids: list[int]) -> str:
    """The text of `byte_fallback`'s tokens after others, bytes that are not valid replaced one by one."""
    library = byte_fallback()
    text = b""
    run = b""
    for token in ids:
        piece = library.id_to_token(token)
        if piece is None or token <= 2:
            continue
        if piece.startswith("<0x"):
            run += bytes.fromhex(piece[3:5])
        else:
            text += run.decode(errors="replace").encode() + piece.replace("▁", " ").encode()
            run = b""
    return text.decode() + run.decode(errors="replace")


@pytest.mark.parametrize("kind", OF_BYTES)
def test_a_character_comes_when_its_last_byte_has(kind: Callable[[], Library]) -> None:
    tokenizer = tokenizer_of(kind)
    ids = bytes_of(tokenizer, "😀한é!".encode())
    shown, _ = streamed(tokenizer, tokenizer.encode("x"), ids)
    assert shown == ["", "", "", "😀", "", "", "한", "", "é", "!"]


def bytes_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """A token for each byte."""
    pieces = {tokenizer.piece(token): token for token in reversed(range(tokenizer.vocabulary))}
    if tokenizer is tokenizer_of(bytes_and_more):
        return bytes_of(tokenizer_of(byte_level), data)
    return [pieces[bytes([byte])] for byte in data]


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_began_comes_whole(kind: Callable[[], Library], cut: int) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = [*tokenizer.encode("한국 fox"), *bytes_of(tokenizer, "한😀".encode())]
    end = len(prompt) - cut
    shown, text = streamed(tokenizer, prompt[:end], [*prompt[end:], *bytes_of(tokenizer, b"!")])
    assert shown == [""] * (cut - 1) + ["😀", "!"]
    assert text == "😀!"


@pytest.mark.parametrize("kind", OF_BYTES)
def test_bytes_that_are_no_text_are_replaced_and_end(kind: Callable[[], Library]) -> None:
    tokenizer = tokenizer_of(kind)
    ids = bytes_of(tokenizer, b"\xff\xe2\x82\xc0" * 200)
    shown, text = streamed(tokenizer, tokenizer.encode("x"), ids)
    assert len("".join(shown)) > len(text) - 4
    assert set(text) == {REPLACEMENT}


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_at_the_end_of_a_long_text(kind: Callable[[], Library]) -> None:
    tokenizer = tokenizer_of(kind)
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    for token in np.random.default_rng(0).integers(0, tokenizer.vocabulary, 3000).tolist():
        detokenizer.push(token)
        assert len(detokenizer._context) + len(detokenizer._pending) < 20


def test_special_tokens_have_no_text_and_no_effect() -> None:
    tokenizer = tokenizer_of(byte_level)
    end = tokenizer.encode("<|end|>")
    assert len(end) == 1
    halves = bytes_of(tokenizer, "😀".encode())
    shown, text = streamed(tokenizer, [], [halves[0], *end, *halves[1:], *end, 10**6])
    assert shown == ["", "", "", "", "😀", "", ""]
    assert text == tokenizer.decode([*end, *halves]) == "😀"


def test_a_prompt_begins_as_the_model_is_used_to() -> None:
    assert tokenizer_of(byte_fallback).encode("x")[0] == 1


def test_a_tokenizer_is_read_from_beside_the_graph(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=100)
    (tmp_path / "tokenizer.json").write_bytes(to_json(library))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocabulary == library.get_vocab_size()
    assert len(tokenizer.encode("a b c d e f")) == 11, "neither cut nor padded"
    assert tokenizer.decode(tokenizer.encode("한 😀")) == "한 😀"


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, metaspace, characters])
def test_the_longest_token_bounds_a_texts_tokens(kind: Callable[[], Library]) -> None:
    tokenizer = tokenizer_of(kind)
    for text in TEXTS:
        assert len(text.encode()) <= len(tokenizer.encode(text)) * tokenizer.longest_token_bytes


def test_a_text_of_far_too_many_tokens_is_not_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(characters)
    encode, encoded = tokenizer.encode, []

    def counted(text: str) -> list[int]:
        encoded.append(len(text))
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", counted)
    letter = TEXTS[0][0]
    assert tokenizer.exceeds(letter * 1_000_000, 1000)
    assert sum(encoded) < 100_000
    assert not tokenizer.exceeds(letter * 1_000_000, 500_000)
    assert not tokenizer.exceeds(letter * 100, 10)  # the whole will say it exactly


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[]", b'{"model": {"type": "BPE"}}'])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"^tokenizer.json: the library 'tokenizers' .* can't read it: "):
        Tokenizer.load(tmp_path)


def test_a_file_that_the_library_panics_at_is_refused(tmp_path: Path) -> None:
    library = Library(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    content = library.to_str().replace(
        '"continuing_subword_prefix":null', '"continuing_subword_prefix":"####"'
    )
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"^tokenizer.json: "):
        Tokenizer.load(tmp_path)


def test_without_the_library_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"pip install 'onnxedge\[text\]'"):
        Tokenizer.load(tmp_path)


def test_a_text_that_the_vocabulary_cannot_express_is_refused_by_character() -> None:
    with pytest.raises(InvalidArgumentError, match=r"its vocabulary doesn't have '\^', '~'$"):
        tokenizer_of(characters).encode("fox~^~")


def test_a_decoder_that_panics_is_an_error_of_the_model() -> None:
    library = characters()
    library.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip("f", 0, 5)])
    tokenizer = Tokenizer(library)
    with pytest.raises(InternalError, match=r"^the tokenizer can't decode \[\d+, \d+\]: "):
        tokenizer.decode(tokenizer.encode("ff"))
