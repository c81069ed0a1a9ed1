from pathlib import Path

import pytest

from train.data import tinyshakespeare
from train.data.download import DataError
from train.data.text import TextData, hold_out, load_text_data, split_text


def test_the_checkout_has_all_of_tinyshakespeare() -> None:
    data = load_text_data("tinyshakespeare", data_dir=None)
    assert data.name == "tinyshakespeare"
    assert (len(data.train), len(data.test)) == (1_003_854, 111_540)  # as in nanoGPT
    assert data.train.startswith("First Citizen:\nBefore we proceed")
    assert len(set(data.train)) == 65


def test_the_copy_is_the_original(real_data: Path) -> None:
    original = load_text_data("tinyshakespeare", data_dir=real_data)
    assert original == load_text_data("tinyshakespeare", data_dir=real_data / "tinyshakespeare")
    assert original.sha256() == tinyshakespeare.load_sample().sha256()


def test_a_changed_copy_is_refused(tmp_path: Path) -> None:
    text = (tinyshakespeare.SAMPLE / tinyshakespeare.FILE).read_bytes()
    (tmp_path / tinyshakespeare.FILE).write_bytes(text.replace(b"Citizen", b"citizen", 1))
    with pytest.raises(DataError, match=r"input\.txt: damaged or another file"):
        load_text_data("tinyshakespeare", data_dir=tmp_path)


def test_a_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    text = "Zeile\r\n가나다\n\n\tend  \n" * 10
    (tmp_path / "notes.txt").write_bytes(text.encode())
    data = load_text_data("file", data_dir=None, text_file=str(tmp_path / "notes.txt"))
    assert data.name == "file notes.txt"
    assert data.train + data.test == text
    assert len(data.train) == int(0.9 * len(text))


def test_a_file_that_is_not_utf8_names_the_bad_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("plain é".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin1\.txt: expected UTF-8, got byte 0xe9 at offset 6"):
        load_text_data("file", data_dir=None, text_file=str(path))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"can't be read: .*--text-file names a text file"):
        load_text_data("file", data_dir=None, text_file=str(tmp_path / name))


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'wikitext' is not one of tinyshakespeare, file"):
        load_text_data("wikitext", data_dir=None)


def test_the_end_of_the_train_text_is_held_out() -> None:
    text = "".join(chr(97 + index % 26) for index in range(1000))
    data = split_text("alphabet", text)
    fitted, held_out = hold_out(data.train)
    assert (len(fitted), len(held_out), len(data.test)) == (855, 45, 100)
    assert held_out + fitted + data.test == text


def test_the_digest_knows_the_splits_apart() -> None:
    assert TextData("a", "one", "two").sha256() == TextData("b", "one", "two").sha256()
    assert TextData("a", "one", "two").sha256() != TextData("a", "onet", "wo").sha256()
