import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train import simplecnn
from train.data import fashion_mnist, image_folder, mnist
from train.data.cifar10 import TEST_BATCH, TRAIN_BATCHES, BatchUnpickler, read_tarball
from train.data.download import DataError
from train.data.idx import read_idx, read_splits
from train.data.images import ImageData, load_image_data

BOOT = Path(__file__).parents[1] / "data" / "boot.png"


def idx(array: np.ndarray) -> bytes:
    """A canonical idx file, before compression."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


# --- the idx format ---


def test_idx_gives_the_array_that_was_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\0\0\x08\x01", "can't be read as compressed idx"),
        (gzip.compress(idx(np.zeros(9, np.uint8)))[:-9], "can't be read as compressed idx"),
        (gzip.compress(b"\0\0"), "can't be read as compressed idx"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\0"), "expected idx with unsigned bytes, found magic 00000d"),
        (gzip.compress(idx(np.zeros(9, np.uint8))[:-1]), r"the header \[9\] asks for 9 bytes"),
        (gzip.compress(idx(np.zeros(9, np.uint8)) + b"\0"), r"the header \[9\] asks for 9 bytes"),
        (gzip.compress(b"\0\0\x08\x02" + b"\xff" * 8), r"the header \[.*\] asks for more than"),
    ],
    ids=["not gzip", "truncated gzip", "short header", "floats", "too few", "too many", "too large"],
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "broken.gz").write_bytes(data)
    with pytest.raises(DataError, match=rf"broken\.gz: {complaint}"):
        read_idx(tmp_path / "broken.gz")


# --- Fashion-MNIST and its sample ---


def test_the_sample_is_balanced() -> None:
    data = fashion_mnist.load_sample()
    assert data.name == "fashion_mnist (sample)"
    assert data.train_images.shape == (4400, 28, 28, 1)
    assert data.test_images.shape == (3500, 28, 28, 1)
    assert np.bincount(data.train_labels).tolist() == [440] * 10
    assert np.bincount(data.test_labels).tolist() == [350] * 10
    assert sum(path.stat().st_size for path in fashion_mnist.SAMPLE.iterdir()) < 3_000_000


def test_no_test_row_of_the_sample_is_a_training_row() -> None:
    data = fashion_mnist.load_sample()
    train = {row.tobytes() for row in data.train_images}
    assert not any(row.tobytes() in train for row in data.test_images)
    assert np.asarray(Image.open(BOOT)).tobytes() not in train


def test_the_sample_is_what_its_readme_says(real_data: Path) -> None:
    original = load_image_data("fashion_mnist", data_dir=real_data, sample=False)
    sample = fashion_mnist.load_sample()
    for split, count in (("train", 440), ("test", 350)):
        labels = getattr(original, f"{split}_labels")
        rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        for part in ("images", "labels"):
            drawn = getattr(original, f"{split}_{part}")[rows]
            assert np.array_equal(drawn, getattr(sample, f"{split}_{part}"))
    with Image.open(BOOT) as image:
        assert np.array_equal(np.asarray(image), original.test_images[0, :, :, 0])
    assert original.labels[original.test_labels[0]] == "Ankle boot"


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(fashion_mnist.SAMPLE, tmp_path, dirs_exist_ok=True)
    train_labels, test_images = list(fashion_mnist.SAMPLE_SHA256)[1:3]
    path = tmp_path / test_images
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{test_images}: damaged or another file: sha256"):
        read_splits(tmp_path, fashion_mnist.SAMPLE_SHA256)
    (tmp_path / train_labels).unlink()
    with pytest.raises(DataError, match=f"{train_labels}: no such file; --data-dir"):
        read_splits(tmp_path, fashion_mnist.SAMPLE_SHA256)


def test_a_folder_is_taken_itself_or_by_the_data_sets_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "SHA256", fashion_mnist.SAMPLE_SHA256)
    shutil.copytree(fashion_mnist.SAMPLE, tmp_path / "mnist")
    within = load_image_data("mnist", data_dir=tmp_path, sample=True)  # a folder comes before the sample
    itself = load_image_data("mnist", data_dir=tmp_path / "mnist", sample=False)
    assert within.name == "mnist"
    assert within.sha256() == itself.sha256()


def test_unknown_data_and_a_missing_sample_are_named() -> None:
    with pytest.raises(ValueError, match="data set 'imagenet' is not one of fashion_mnist"):
        load_image_data("imagenet", data_dir=None, sample=True)
    with pytest.raises(DataError, match="mnist has no offline sample; name its folder with --data-dir"):
        load_image_data("mnist", data_dir=None, sample=True)


def test_the_original_mnist_is_read(real_data: Path) -> None:
    data = load_image_data("mnist", data_dir=real_data, sample=False)
    assert data.train_images.shape == (60000, 28, 28, 1)
    assert np.bincount(data.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert not data.flip_keeps_label


def image_data(**changes: Any) -> ImageData:
    images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    return ImageData(name="toy", labels=("a", "b"), **{**arrays, **changes})


def test_images_and_labels_must_belong_together() -> None:
    with pytest.raises(ValueError, match="toy train: expected UINT8"):
        image_data(train_images=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"with labels \[3\]"):
        image_data(test_labels=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="toy test: a label is outside the 2 classes"):
        image_data(test_labels=np.array([0, 2]))


def test_the_digest_changes_with_every_part() -> None:
    digests = {image_data().sha256()}
    digests.add(image_data(train_images=np.ones((2, 4, 4, 1), np.uint8)).sha256())
    digests.add(image_data(train_labels=np.array([0, 1])).sha256())
    digests.add(image_data(test_images=np.ones((2, 4, 4, 1), np.uint8)).sha256())
    digests.add(image_data(test_labels=np.array([0, 1])).sha256())
    assert len(digests) == 5


# --- CIFAR-10 ---


def python2_string(data: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(data)) + data


def python2_batch(rows: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 with numpy 1 pickled it: protocol 2, strings as bytes.

    Args:
        rows: UINT8 [n, 3072].
        labels: n class indices below 256.
    """
    shape = b"".join(b"J" + struct.pack("<i", size) for size in rows.shape) + b"\x86"
    empty = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2_string(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + python2_string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + python2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + python2_string(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + python2_string(b"data") + array + python2_string(b"labels") + numbers + b"u."


def tarball(path: Path, batches: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_the_cifar_tarball_is_read_in_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    names = (*TRAIN_BATCHES, TEST_BATCH)
    batches = {name: python2_batch(rows[place], [place, 9]) for place, name in enumerate(names)}
    images, labels, test_images, test_labels = read_tarball(tarball(tmp_path / "cifar.tar.gz", batches))
    assert images.shape == (10, 32, 32, 3)
    assert labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test_images.shape == (2, 32, 32, 3)
    assert test_labels.tolist() == [5, 9]
    # A row is the red plane, then green, then blue, each by rows of 32.
    assert images[3, 7, 5].tolist() == [rows[1, 1, plane * 1024 + 7 * 32 + 5] for plane in range(3)]


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.rmdir, (os.fspath(self.victim),)


def test_a_batch_that_would_run_code_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    data = pickle.dumps({"data": Malice(victim), "labels": []}, protocol=2)
    path = tarball(tmp_path / "evil.tar.gz", {TRAIN_BATCHES[0]: data})
    with pytest.raises(DataError, match=r"evil\.tar\.gz: data_batch_1 .* \w+\.rmdir does not belong"):
        read_tarball(path)
    assert victim.is_dir()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.core.multiarray.scalar"]
)
def test_the_unpickler_knows_three_names_only(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(pickle.UnpicklingError, match=name):
        BatchUnpickler(io.BytesIO(f"c{module}\n{attribute}\n.".encode())).load()


def test_a_tarball_without_a_batch_is_refused(tmp_path: Path) -> None:
    path = tarball(tmp_path / "short.tar.gz", {})
    with pytest.raises(
        DataError, match=r"short\.tar\.gz: can't be read as the CIFAR-10 tarball.*data_batch_1"
    ):
        read_tarball(path)
    path.write_bytes(b"not a tarball")
    with pytest.raises(DataError, match="can't be read as the CIFAR-10 tarball"):
        read_tarball(path)


def test_a_cifar_folder_without_files_asks_for_the_tarball(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: no such file; --data-dir"):
        load_image_data("cifar10", data_dir=tmp_path, sample=False)


def test_the_cifar_mosaics_hold_the_original_rows(real_data: Path) -> None:
    data = load_image_data("cifar10", data_dir=real_data, sample=False)
    assert data.train_images.shape == (50000, 32, 32, 3)
    assert data.test_images.shape == (10000, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    # The published mean of the training pixels.
    mean = data.train_images.mean(axis=(0, 1, 2)) / 255
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert data.labels[data.train_labels[0]] == "frog"  # known of the first two rows
    assert data.labels[data.train_labels[1]] == "truck"


# --- a folder of images per class ---


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def load_images(folder: Path, size: int = 8) -> ImageData:
    return load_image_data("folder", data_dir=folder, sample=False, image_size=size)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_an_image_folder_is_read_by_its_splits(tmp_path: Path, held_out: str) -> None:
    root = tmp_path / "pets"
    write_image(root / "train" / "dog" / "1.png", (255, 0, 0))
    write_image(root / "train" / "cat" / "1.PNG", (0, 255, 0))
    write_image(root / "train" / "cat" / "2.webp", (0, 250, 0))
    write_image(root / held_out / "dog" / "1.jpg", (250, 0, 0))
    write_image(root / held_out / "cat" / "1.png", (0, 200, 0))
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    data = load_images(root)
    assert data.name == "folder pets"
    assert data.labels == ("cat", "dog")
    assert data.train_images.shape == (3, 8, 8, 3)
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.train_images[0, 4, 4].tolist() == [0, 255, 0]
    assert data.train_images[2, 4, 4].tolist() == [255, 0, 0]
    assert data.test_labels.tolist() == [0, 1]
    assert data.test_images[0, 4, 4].tolist() == [0, 200, 0]


def test_grey_levels_of_sixteen_bits_become_eight(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for index in range(2):
            levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4 * 257
            Image.fromarray(levels).save(tmp_path / name / f"{index}.png")
    image = load_images(tmp_path).train_images[0]
    assert np.array_equal(image, np.repeat(np.arange(0, 256, 4).reshape(8, 8, 1), 3, axis=2))


def test_the_test_folder_comes_before_val(tmp_path: Path) -> None:
    for split, red in (("train", 1), ("val", 2), ("test", 3)):
        for label in ("a", "b"):
            write_image(tmp_path / split / label / "1.png", (red, 0, 0))
    assert load_images(tmp_path).test_images[0, 0, 0, 0] == 3


@pytest.mark.parametrize("below", [".", "train"])
def test_without_a_test_folder_a_fixed_fifth_of_each_class_is_one(tmp_path: Path, below: str) -> None:
    for index, (label, count) in enumerate([("a", 10), ("b", 20), ("c", 2)]):
        for number in range(count):
            write_image(tmp_path / below / label / f"{number:02}.png", (index, number, 0))
    data = load_images(tmp_path)
    assert np.bincount(data.train_labels).tolist() == [8, 16, 1]
    assert np.bincount(data.test_labels).tolist() == [2, 4, 1]
    shown = [tuple(image[0, 0]) for image in (*data.train_images, *data.test_images)]
    assert len(set(shown)) == 32  # no image is in both, none is lost
    assert load_images(tmp_path).sha256() == data.sha256()


def test_images_are_turned_upright_resized_and_cropped_to_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # a white square between two black ones
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, the image is 20 wide and 60 high
    turned = np.zeros((20, 60, 3), np.uint8)
    turned[:, 20:40] = (np.arange(20) * 12)[:, None, None]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number in range(2):
        Image.fromarray(wide).save(tmp_path / "a" / f"{number}.png")
        Image.fromarray(turned).save(tmp_path / "b" / f"{number}.png", exif=exif)
    data = load_images(tmp_path, size=10)
    assert data.train_images[0, 1:-1, 1:-1].min() > 250
    across = data.train_images[1, 5, :, 0].astype(int)
    assert (np.diff(across) < 0).all()  # the rows' gradient runs along the columns, from the right


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    for label in ("a", "b"):
        for number in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            image = Image.new("RGB", (9, 9), (90, 90, 90))
            # convert("P") would dither with a fixed palette that has no such grey
            image = image.quantize() if mode == "P" else image.convert(mode)
            image.save(tmp_path / label / f"{number}.{suffix}")
    pixels = load_images(tmp_path).train_images
    assert pixels.shape == (2, 8, 8, 3)
    assert np.abs(pixels.astype(int) - 90).max() < 8


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(2):
            write_image(tmp_path / label / f"{number}.png", (9, 9, 9), size=(50, 50))
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b/1\.png: can't be read as an image: .*; repair or remove it"):
        load_images(tmp_path)
    (tmp_path / "b" / "1.png").write_text("<html>")
    with pytest.raises(DataError, match=r"b/1\.png: can't be read as an image"):
        load_images(tmp_path)


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data folder: name the folder .* --data-dir"):
        load_image_data("folder", data_dir=None, sample=False)
    with pytest.raises(DataError, match="absent: no such folder; --data-dir"):
        load_images(tmp_path / "absent")
    write_image(tmp_path / "a" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="expected a folder per class, at least 2, found 1"):
        load_images(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"/b: no images; expected files named \*\.png, "):
        load_images(tmp_path)
    write_image(tmp_path / "b" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="/a: expected at least 2 images, found 1"):
        load_images(tmp_path)


def test_train_and_test_must_have_the_same_classes(tmp_path: Path) -> None:
    for path in ("train/a", "train/b", "test/a", "test/c"):
        write_image(tmp_path / path / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match=r"test: expected the classes of .*train; not in both: b, c"):
        load_images(tmp_path)


def test_more_images_than_memory_are_refused_before_they_are_read(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{number}.png").touch()
    assert image_folder.MAX_BYTES == 4 * 2**30
    with pytest.raises(DataError, match=r"4 images of 20000 x 20000 need 4\.5 GiB .* lower --image-size"):
        load_images(tmp_path, size=20_000)


def test_an_image_folder_can_be_trained_on(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for label, brightness in (("bright", 200), ("dark", 40)):
        for number in range(20):
            shade = int(brightness + generator.integers(-30, 30))
            write_image(tmp_path / label / f"{number:02}.png", (shade, shade, shade))
    recipe = simplecnn.Recipe(data="folder", image_size=16, batch_size=8, channels=4, hidden=8, dropout=0.0)
    task = simplecnn.task(recipe, tmp_path)
    assert (task.arguments["classes"], task.arguments["channels"], task.arguments["image_size"]) == (2, 3, 16)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    for epoch in range(8):
        for batch in task.batches(torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            task.loss(task.model.train(), batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            optimizer.step()
    assert task.test(task.model)["accuracy"] == 1.0
    assert task.trivial.test == 0.5
