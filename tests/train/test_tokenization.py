import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from train.data.tinyshakespeare import load_sample
from train.tokenization import encode, from_json, to_json, train_tokenizer

TEXTS = ("To be, or not to be: that is the question.\n\n", "  Whether 'tis nobler\r\n\tin the mind\n")


@pytest.fixture(scope="module")
def play() -> str:
    return load_sample().train[:100_000]


@pytest.fixture(scope="module")
def byte_pairs(play: str) -> Tokenizer:
    return train_tokenizer("bpe", [play], 512)


def test_characters_are_numbered_by_their_code_points() -> None:
    tokenizer = train_tokenizer("char", ["banana", "c\n"], 0)
    assert tokenizer.get_vocab() == {"\n": 0, "a": 1, "b": 2, "c": 3, "n": 4}
    ids = encode(tokenizer, "nab\n")
    assert ids.dtype == np.int64
    assert ids.tolist() == [4, 1, 2, 0]


@given(text=st.text(min_size=1))
@settings(max_examples=200, deadline=None)
def test_characters_come_back_as_they_went(text: str) -> None:
    tokenizer = from_json(to_json(train_tokenizer("char", [text], 0)))
    ids = encode(tokenizer, text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids.tolist()) == text


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_byte_pairs_bring_any_text_back(byte_pairs: Tokenizer, text: str) -> None:
    assert byte_pairs.decode(encode(byte_pairs, text).tolist(), skip_special_tokens=False) == text


def test_byte_pairs_shorten_the_text_they_were_learned_from(byte_pairs: Tokenizer, play: str) -> None:
    assert byte_pairs.get_vocab_size() == 512
    ids = encode(byte_pairs, play)
    assert len(ids) < 0.6 * len(play)
    assert byte_pairs.decode(ids.tolist()) == play


def test_a_short_text_has_fewer_pairs_than_were_asked_for() -> None:
    assert train_tokenizer("bpe", ["aaaa"], 1000).get_vocab_size() == 256 + 2  # aa and aaaa


def test_an_empty_text_is_no_tokens() -> None:
    assert encode(train_tokenizer("char", TEXTS, 0), "").shape == (0,)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_same_texts_give_the_same_file_in_another_process(kind: str) -> None:
    code = (
        "import sys; from train.tokenization import to_json, train_tokenizer; "
        f"sys.stdout.buffer.write(to_json(train_tokenizer({kind!r}, {TEXTS!r}, 300)))"
    )
    # Python's own hashes of strings differ from process to process.
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert other.stdout == to_json(train_tokenizer(kind, TEXTS, 300))  # type: ignore[arg-type]  # a parameter
    assert to_json(from_json(other.stdout)) == other.stdout


def test_an_unknown_character_is_named() -> None:
    tokenizer = train_tokenizer("char", TEXTS, 0)
    with pytest.raises(ValueError, match=r"'Z', '가': not among the \d+ characters .* --tokenizer bpe"):
        encode(tokenizer, "to 가Z be")


@pytest.mark.parametrize(
    ("kind", "texts", "vocabulary", "complaint"),
    [
        ("word", TEXTS, 300, "tokenizer 'word' is not one of char, bpe"),
        ("bpe", TEXTS, 255, "--vocabulary: expected at least 256, one per byte, got 255"),
        ("char", ("",), 0, "expected texts to take the characters from, got none"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(
    kind: str, texts: tuple[str, ...], vocabulary: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train_tokenizer(kind, texts, vocabulary)  # type: ignore[arg-type]  # wrong values are the point
