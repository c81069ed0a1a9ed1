import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import main
from train.checkpoint import INFO, load_checkpoint, load_info
from train.device import available_cpus
from train.family import FAMILIES, load_family

TINY = shlex.split(
    "mobilenet --recipe quick --epochs 1 --train-rows 64 --validation-fraction .01 --width .1 --batch-size 16"
)


def test_a_run_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out), "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert "fashion_mnist (sample)" in printed
    assert "epoch   1/1" in printed
    assert f"checkpoint: {out}\nnext: python -m export {out} --to models/ --name run\n" in printed
    info = load_checkpoint(out).info
    assert (info.family, info.seed, info.epoch) == ("mobilenet", 5, 1)
    assert info.recipe["train_rows"] == 64
    assert f"test accuracy {info.metrics['test_accuracy']:.4f} with the weights of epoch 1" in printed


def test_a_trained_checkpoint_is_not_lost_to_a_forgotten_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    assert main([*TINY, "--out", str(out), "--seed", "5"]) == 1
    assert "has a checkpoint of 1 epoch; --resume goes on from it, --overwrite" in capsys.readouterr().err
    assert load_info(out).seed == 0
    assert main([*TINY, "--out", str(out), "--seed", "5", "--overwrite"]) == 0
    assert load_info(out).seed == 5


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "train", *TINY, "--epochs", "100000", "--out", str(out)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch   2/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    info = load_checkpoint(out).info
    assert info.epoch >= 2
    resume = ["mobilenet", "--resume", "--out", str(out)]
    assert (
        f"{out} has {info.epoch} finished epochs; go on with: python -m train {shlex.join(resume)}" in errors
    )
    assert "Traceback" not in errors
    assert main([*resume, "--epochs", str(info.epoch + 1)]) == 0
    assert f"{info.epoch} of {info.epoch + 1} epochs done" in capsys.readouterr().out
    assert load_info(out).epoch == info.epoch + 1


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed when these arguments are refused with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--epoch 1", "--epoch: unknown; did you mean --epochs?"),
        ("--learningrate=1", "--learningrate: unknown; did you mean --learning-rate?"),
        ("--zzz", "--zzz: unknown; --help lists the flags"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--data imagenet", "argument --data: invalid choice: 'imagenet'"),
        ("--width -1", "--width: expected above 0, got -1.0"),
        ("--sample --data-dir .", "--sample and --data-dir exclude each other"),
        ("--resume --recipe quick", "--recipe: --resume keeps the checkpoint's recipe"),
        ("--resume --width 1 --seed 1", "--seed, --width: --resume keeps the checkpoint's recipe"),
    ],
)
def test_wrong_flags_are_refused_with_the_reason(
    flags: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"error: {complaint}" in refused(["mobilenet", *shlex.split(flags)], capsys)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing given as the family"),
        (["mobilenett"], "mobilenett given as the family; did you mean mobilenet?"),
        (["--epochs", "1"], "--epochs given as the family"),
    ],
)
def test_the_family_comes_first(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = refused(arguments, capsys)
    assert "usage: python -m train FAMILY" in printed
    assert complaint in printed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_field_is_a_flag_with_help(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([family, "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--learning-rate FLOAT peak of the schedule" in printed
    assert {"quick", "cpu", "reference"} <= set(load_family(family).RECIPES)


def test_there_must_be_something_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mobilenet", "--resume", "--out", str(tmp_path / "absent")]) == 1
    assert "absent: no such checkpoint folder" in capsys.readouterr().err


def test_a_checkpoint_of_another_family_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    document = json.loads((out / INFO).read_text()) | {"family": "resnet"}
    (out / INFO).write_text(json.dumps(document))
    assert main(["mobilenet", "--resume", "--out", str(out)]) == 1
    assert "a checkpoint of family 'resnet', expected 'mobilenet'" in capsys.readouterr().err


def test_a_folder_without_the_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert "error: " in (printed := capsys.readouterr().err)
    assert "train-images-idx3-ubyte.gz: no such file" in printed


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["mobilenet", "--recipe", "quick", "--batch-size", "3961", "--out"]
    assert main([*arguments, str(tmp_path / "run")]) == 1
    assert "--batch-size: expected at most 3960, the training rows, got 3961" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert "holds thesis.txt" in capsys.readouterr().err


def test_threads_follow_the_cpus_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("train.device.CPU_QUOTA", quota)
    assert available_cpus() == len(os.sched_getaffinity(0))
    quota.write_text("max 100000\n")
    assert available_cpus() == len(os.sched_getaffinity(0))
    quota.write_text("100000 100000\n")
    assert available_cpus() == 1
    quota.write_text("50000 100000\n")
    assert available_cpus() == 1
