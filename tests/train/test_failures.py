"""What goes wrong around a training: killed, interrupted, a full disk, damaged or mistaken files."""

import hashlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from train.checkpoint import FILES, INFO, TRAINING_STATE, load_checkpoint, load_info, load_training_state
from train.data.idx import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS

TRAIN = [sys.executable, "-m", "train"]
# Everything on that has a state of its own: dropout, augmentation, a running average, accumulation.
TINY = shlex.split(
    "mobilenet --recipe quick --train-rows 128 --validation-fraction .01 --width .1 --batch-size 16 "
    "--dropout .2 --shift 2 --flip --ema-decay .9 --accumulate 2"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parents[2]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=150
    )


def train(*words: str) -> subprocess.CompletedProcess[str]:
    return run([*TRAIN, *words])


@contextmanager
def training(out: Path, epochs: int, until: str) -> Iterator[subprocess.Popen[str]]:
    """A training that has printed a line that begins so."""
    command = [*TRAIN, *TINY, "--epochs", str(epochs), "--out", str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(until):
            assert process.poll() is None
        yield process


def digests(folder: Path) -> dict[str, str]:
    """Sha256 of each tensor that a checkpoint has, of the best network and of the last state."""
    state = load_training_state(folder)
    tensors = {
        **load_checkpoint(folder).model.state_dict(),
        **{f"last {name}": tensor for name, tensor in state["model"].items()},
        **{f"average {name}": tensor for name, tensor in state["average"].items()},
        "generator": state["generator"],
    }
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_explained(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It failed with one line on stderr that has all of these parts."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of four epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = train(*TINY, "--epochs", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def earlier(whole: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint."""
    return shutil.copytree(whole, tmp_path / "run")


def test_a_run_that_was_killed_resumes_to_the_same_weights(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with training(out, epochs=4, until="epoch   2/4") as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 2 <= load_info(out).epoch < 4
    done = train("mobilenet", "--resume", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(whole)
    assert load_info(out).metrics == load_info(whole).metrics
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in out.iterdir()} <= set(FILES)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_run_that_was_stopped_leaves_its_last_whole_epoch(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with training(out, epochs=100_000, until="epoch   2/") as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    epoch = load_info(out).epoch
    assert epoch >= 2
    assert load_checkpoint(out).info.epoch == epoch
    assert load_training_state(out)["progress"]["epoch"] == epoch


def test_a_file_that_grows_too_large_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with training(out, epochs=100_000, until="epoch   1/") as process:
        # From here on the disk takes files of a few bytes only.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        printed, errors = process.communicate(timeout=60)
    done = subprocess.CompletedProcess(process.args, process.returncode, printed, errors)
    assert_explained(done, f"{out}: the checkpoint can't be written: File too large", "make room", "--out")
    assert load_checkpoint(out).info.epoch >= 1
    assert load_training_state(out)["progress"]["epoch"] == load_info(out).epoch
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_full_disk_is_named_and_the_last_checkpoint_is_kept(earlier: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # A disk of its own, which only this process and its children see, with room for one checkpoint.
    size = 1024 + sum(path.stat().st_size for path in earlier.iterdir()) // 1024 * 3 // 2
    resume = shlex.join([*TRAIN, "mobilenet", "--resume", "--epochs", "5", "--out", str(disk / "run")])
    script = f"""
        mount -t tmpfs -o size={size}k tmpfs {shlex.quote(str(disk))} || exit 99
        cp -r {shlex.quote(str(earlier))} {shlex.quote(str(disk))}
        head -c $(({size} * 1024)) /dev/zero > {shlex.quote(str(disk / "film"))} 2> /dev/null
        {resume}
        status=$?
        cp -r {shlex.quote(str(disk / "run"))} {shlex.quote(str(tmp_path / "after"))}
        exit $status
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare program")
    done = run([unshare, "--map-root-user", "--mount", "sh", "-c", script])
    if not (tmp_path / "after").exists():
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert_explained(
        done, f"{disk / 'run'}: the checkpoint can't be written: No space left on device", "make room"
    )
    assert contents(tmp_path / "after") == contents(earlier)
    assert load_checkpoint(tmp_path / "after").info.epoch == 4


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "run"
    assert_explained(train(*TINY, "--epochs", "1", "--out", str(out)), f"{out}: ", "Not a directory")


def test_a_damaged_data_file_is_named(tmp_path: Path) -> None:
    for name in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS):
        (tmp_path / name).write_bytes(b"half of a download")
    done = train(*TINY, "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"))
    assert_explained(done, f"{tmp_path / TRAIN_IMAGES}: damaged or another file: sha256 ", "expected ")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_not_resumed(earlier: Path) -> None:
    content = bytearray((earlier / TRAINING_STATE).read_bytes())
    content[len(content) // 2] ^= 1
    (earlier / TRAINING_STATE).write_bytes(content)
    done = train("mobilenet", "--resume", "--epochs", "5", "--out", str(earlier))
    assert_explained(done, f"{earlier / TRAINING_STATE}: damaged, sha256 ", f"but {INFO} says", "train again")


def test_a_checkpoint_of_another_family_is_not_resumed(earlier: Path) -> None:
    before = contents(earlier)
    done = train("simplecnn", "--resume", "--out", str(earlier))
    assert_explained(done, f"{earlier}: a checkpoint of family 'mobilenet', expected 'simplecnn'")
    assert contents(earlier) == before
