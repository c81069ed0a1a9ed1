import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from train.classification import majority_class
from train.data import nsmc, sst2
from train.data.download import DataError
from train.data.sentences import SentenceData, load_sentence_data, read_lines, split_columns
from train.sentence_classification import (
    classification_data,
    length_batches,
    pad,
    split_data,
)
from train.tokenization import to_json
from train.wordpiece import CLS, SEP, SPECIAL_TOKENS, UNKNOWN, encode, train_wordpiece


@pytest.fixture(scope="module")
def reviews() -> SentenceData:
    return load_sentence_data("nsmc", data_dir=None, sample=True)


@pytest.fixture(scope="module")
def tokenizer(reviews: SentenceData) -> Tokenizer:
    return train_wordpiece(reviews.train_texts, 8000)


def test_the_sample_has_its_rows_and_both_classes_alike(reviews: SentenceData) -> None:
    assert (reviews.name, reviews.labels) == ("nsmc (sample)", ("negative", "positive"))
    assert (len(reviews.train_texts), len(reviews.test_texts)) == (16_000, 4_000)
    for labels in (reviews.train_labels, reviews.test_labels):
        assert 0.48 < labels.mean() < 0.52
    assert all(text.strip() for text in (*reviews.train_texts, *reviews.test_texts))
    assert sum("영화" in text for text in reviews.train_texts) > 3000


def test_the_sample_is_drawn_as_its_note_says(real_data: Path) -> None:
    generator = np.random.default_rng(0)
    for name, count in ((nsmc.TRAIN, 16_000), (nsmc.TEST, 4_000)):
        header, *lines = read_lines(real_data / "nsmc", name, nsmc.SHA256[name])
        lines = [line for line in lines if line.split("\t")[1].strip()]
        drawn = np.sort(generator.choice(len(lines), count, replace=False))
        expected = [header, *(lines[index] for index in drawn)]
        assert read_lines(nsmc.SAMPLE, name, nsmc.SAMPLE_SHA256[name]) == expected


def test_the_original_keeps_empty_texts_out_of_training_alone(real_data: Path) -> None:
    data = load_sentence_data("nsmc", data_dir=real_data, sample=True)
    assert (data.name, len(data.train_texts), len(data.test_texts)) == ("nsmc", 149_995, 50_000)
    assert sum(not text.strip() for text in data.train_texts) == 0
    assert sum(not text.strip() for text in data.test_texts) == 3


def test_sst2_comes_with_a_validation_split(real_data: Path) -> None:
    data = load_sentence_data("sst2", data_dir=real_data, sample=False)
    counts = [len(data.train_texts), len(data.validation_texts), len(data.test_texts)]
    assert counts == [6920, 872, 1821]
    # As the treebank has it: these two are in both splits.
    assert set(data.test_texts) & set(data.train_texts) == {"no", "what 's next ?"}
    splits = split_data(data, validation_fraction=0.5, train_rows=0)
    assert splits.validation.texts == data.validation_texts
    assert sorted(splits.fitted.texts) == sorted(data.train_texts)


def test_sst2_says_that_its_folder_must_be_named() -> None:
    with pytest.raises(DataError, match=r"no canonical download address; name the folder.*--data-dir"):
        load_sentence_data("sst2", data_dir=None, sample=False)
    with pytest.raises(DataError, match=r"sst2 has no offline sample; .*--data-dir"):
        load_sentence_data("sst2", data_dir=None, sample=True)
    with pytest.raises(ValueError, match="'imdb' is not one of nsmc, sst2"):
        load_sentence_data("imdb", data_dir=None, sample=True)


def test_a_text_file_may_be_compressed_or_not(tmp_path: Path) -> None:
    name, digest = nsmc.TEST, nsmc.SAMPLE_SHA256[nsmc.TEST]
    compressed = (nsmc.SAMPLE / f"{name}.xz").read_bytes()
    (tmp_path / name).write_bytes(lzma.decompress(compressed))
    assert read_lines(tmp_path, name, digest) == read_lines(nsmc.SAMPLE, name, digest)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither ratings_train.txt nor ratings_train.txt.xz"):
        nsmc.load_folder(tmp_path)
    content = (nsmc.SAMPLE / f"{nsmc.TRAIN}.xz").read_bytes()
    (tmp_path / f"{nsmc.TRAIN}.xz").write_bytes(content[:-1000])
    with pytest.raises(DataError, match=r"ratings_train.txt.xz: can't be read: .*fetch the file again"):
        nsmc.load_folder(tmp_path)
    (tmp_path / f"{nsmc.TRAIN}.xz").write_bytes(content)
    with pytest.raises(DataError, match=f"damaged or another file: .*expected {nsmc.SHA256[nsmc.TRAIN]}"):
        nsmc.load_folder(tmp_path)


def test_a_line_of_other_columns_is_named() -> None:
    with pytest.raises(DataError, match=r"reviews.txt, line 3: expected 3 columns between tabs, got 2"):
        nsmc.parse([nsmc.HEADER, "1\tgood\t1", "2\tbad"], "reviews.txt")
    with pytest.raises(DataError, match=r"reviews.txt, line 2: expected label 0 or 1 .*, got '7'"):
        nsmc.parse([nsmc.HEADER, "1\tgood\t7"], "reviews.txt")
    with pytest.raises(DataError, match=r"reviews.txt, line 1: expected the header"):
        nsmc.parse(["1\tgood\t1"], "reviews.txt")
    assert split_columns(["fine\u2028\t1"], 2, "dev.tsv") == [["fine\u2028", "1"]]


def test_texts_and_labels_must_belong_together() -> None:
    labels = np.zeros(1, np.int64)
    with pytest.raises(
        ValueError, match=r"x train: expected INT64 labels \[2\], one per text, got int64 \[1\]"
    ):
        SentenceData("x", nsmc.LABELS, ("a", "b"), labels, ("a",), labels)
    with pytest.raises(ValueError, match="x test: a label is outside the 2 classes"):
        SentenceData("x", nsmc.LABELS, ("a",), labels, ("a",), labels + 2)


def test_the_digest_sees_every_text_and_label() -> None:
    labels = np.array([0, 1])
    rows = SentenceData("x", sst2.LABELS, ("a", "b"), labels, ("c", "d"), labels)
    others = [
        SentenceData("x", sst2.LABELS, ("ab", ""), labels, ("c", "d"), labels),
        SentenceData("x", sst2.LABELS, ("a", "b"), labels[::-1].copy(), ("c", "d"), labels),
        SentenceData("x", sst2.LABELS, ("a", "b"), labels, ("c", "d"), labels, ("e",), labels[:1]),
    ]
    assert len({rows.sha256(), *(other.sha256() for other in others)}) == 4
    again = SentenceData("y", sst2.LABELS, ("a", "b"), labels.copy(), ("c", "d"), labels)
    assert again.sha256() == rows.sha256()


def test_fitted_and_held_out_rows_are_disjoint(reviews: SentenceData) -> None:
    splits = split_data(reviews, validation_fraction=0.1, train_rows=1000)
    assert (len(splits.fitted.texts), len(splits.validation.texts)) == (1000, 1600)
    whole = split_data(reviews, validation_fraction=0.1, train_rows=0)
    assert whole.validation.texts == splits.validation.texts
    assert sorted(whole.fitted.texts + whole.validation.texts) == sorted(reviews.train_texts)
    label = dict(zip(reviews.train_texts, reviews.train_labels, strict=True))
    once = [text for text in splits.fitted.texts if reviews.train_texts.count(text) == 1][:50]
    assert all(label[text] == splits.fitted.labels[splits.fitted.texts.index(text)] for text in once)
    trivial = majority_class(
        splits.fitted.labels, validation=splits.validation.labels, test=splits.test.labels
    )
    assert 0.45 < trivial.validation < 0.55
    assert trivial.test in (reviews.test_labels.mean(), 1 - reviews.test_labels.mean())


def test_rows_are_padded_to_the_longest_or_to_a_given_length() -> None:
    rows = [np.array([2, 7, 3]), np.array([2, 3])]
    ids, mask = pad(rows)
    assert ids.tolist() == [[2, 7, 3], [2, 3, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    ids, mask = pad(rows, 5)
    assert (ids.shape, mask.sum().item()) == ((2, 5), 5)


def test_batches_have_rows_of_like_length_each_row_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 64, 1003).tolist()

    def epoch(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [batch.tolist() for batch in length_batches(lengths, 10, generator)]

    batches = epoch(0)
    rows = [row for batch in batches for row in batch]
    assert (len(batches), len(rows), len(set(rows))) == (100, 1000, 1000)
    padded = sum(10 * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert epoch(0) == batches
    assert epoch(1) != batches


def test_korean_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = "재미있어요"
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == CLS
    assert encoding.ids[-1] == SEP
    assert UNKNOWN not in encoding.ids
    assert tokenizer.decode(encoding.ids) == text
    decomposed = "\u110c\u1162\u1106\u1175\u110b\u1175\u11bb\u110b\u1165\u110b\u116d"
    assert tokenizer.encode(decomposed).ids == encoding.ids
    assert tokenizer.decode(tokenizer.encode("LOVE").ids) == "love"


def test_special_tokens_come_first_and_single_characters_are_not_special(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(index) for index in range(5)] == list(SPECIAL_TOKENS)
    assert set(tokenizer.get_added_tokens_decoder()) == set(range(5))
    assert tokenizer.get_vocab_size() == 8000


def test_few_words_of_the_test_split_are_unknown(reviews: SentenceData, tokenizer: Tokenizer) -> None:
    tokens = np.concatenate(encode(tokenizer, reviews.test_texts, 64))
    assert (tokens == UNKNOWN).mean() < 0.005


def test_long_texts_are_cut_and_keep_their_marks(tokenizer: Tokenizer) -> None:
    short, long, empty = encode(tokenizer, ["최고", "영화 " * 100, ""], 16)
    assert (len(short), len(long), empty.tolist()) == (3, 16, [CLS, SEP])
    assert (long[0], long[-1], long.dtype.name) == (CLS, SEP, "int64")


def test_the_same_texts_give_the_same_tokenizer_in_any_process(reviews: SentenceData) -> None:
    program = (
        "import hashlib; from train.data.nsmc import load_sample; from train.tokenization import to_json; "
        "from train.wordpiece import train_wordpiece as train; "
        "print(hashlib.sha256(to_json(train(load_sample().train_texts[:2000], 1000))).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert to_json(train_wordpiece(reviews.train_texts[:2000], 1000)) == to_json(
        train_wordpiece(reviews.train_texts[:2000], 1000)
    )


def test_serving_data_is_padded_to_one_length(reviews: SentenceData, tokenizer: Tokenizer) -> None:
    splits = split_data(reviews, validation_fraction=0.1, train_rows=100)
    data = classification_data(splits, reviews.labels, lambda texts: encode(tokenizer, texts, 32))
    assert data.calibration["input_ids"].shape == (100, 32)
    assert data.held_out["attention_mask"].shape == (4000, 32)
    assert (data.held_out["input_ids"].dtype.name, data.labels) == ("int64", reviews.labels)
    assert np.array_equal(data.targets, reviews.test_labels)
    assert ((data.held_out["input_ids"] != 0) == data.held_out["attention_mask"].astype(bool)).all()
