import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from train import mobilenet
from train.checkpoint import CheckpointError, load_info, load_model, load_training_state
from train.family import Task
from train.loop import Trainer, learning_rate, make_optimizer
from train.recipe import Optimizer

MakeTrainer = Callable[..., Trainer]
Batches = Iterator[tuple[torch.Tensor, ...]]


def interrupted_in(epoch: int, recipe: mobilenet.Recipe) -> Task:
    """The recipe's task, in which Ctrl-C comes in the middle of this epoch."""
    task = mobilenet.task(recipe, None)
    epochs = 0

    def batches(generator: torch.Generator) -> Batches:
        nonlocal epochs
        epochs += 1
        for step, batch in enumerate(task.batches(generator)):
            if epochs == epoch and step == task.steps_per_epoch // 2:
                raise KeyboardInterrupt
            yield batch

    return dataclasses.replace(task, batches=batches)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_training_state(folder)["model"]
    return weights


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_one_batch_can_be_learned_by_heart(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, label_smoothing=0.0, dropout=0.0)
    trainer = make_trainer(recipe=recipe)
    batch = next(trainer.task.batches(trainer.generator))
    trainer.model.train()
    first = float(trainer.train_step(batch, 0.01))
    for _ in range(60):
        last = float(trainer.train_step(batch, 0.01))
    assert first > 1.5  # ln(10) = 2.3 is a guess
    assert last < 0.01


def test_same_seed_same_weights_and_another_seed_others(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe, tmp_path: Path
) -> None:
    assert make_trainer(out="one").fit() == make_trainer(out="two").fit()
    assert identical(last_weights(tmp_path / "one"), last_weights(tmp_path / "two"))
    make_trainer(recipe=dataclasses.replace(recipe, seed=1), out="three").fit()
    assert not identical(last_weights(tmp_path / "one"), last_weights(tmp_path / "three"))


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_run_resumes_to_the_same_weights(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe, tmp_path: Path, epoch: int
) -> None:
    whole = make_trainer(out="whole").fit()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(interrupted_in(epoch, recipe)).fit()
    assert load_model(tmp_path / "run")[0].epoch == epoch - 1
    torch.manual_seed(99)  # a new process has drawn other numbers
    resumed = make_trainer()
    resumed.resume()
    assert resumed.fit() == whole
    assert identical(last_weights(tmp_path / "run"), last_weights(tmp_path / "whole"))
    best, expected = load_model(tmp_path / "run")[1], load_model(tmp_path / "whole")[1]
    assert identical(best.state_dict(), expected.state_dict())


def test_an_interrupt_in_the_first_epoch_keeps_an_earlier_runs_checkpoint(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe, tmp_path: Path
) -> None:
    make_trainer().fit()
    earlier = load_info(tmp_path / "run")
    trainer = make_trainer(interrupted_in(1, recipe))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert not trainer.saved
    assert load_info(tmp_path / "run") == earlier


def test_the_checkpoint_has_the_best_weights_and_the_last_state(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe, tmp_path: Path
) -> None:
    figures = iter([0.9, 0.1])
    task = dataclasses.replace(mobilenet.task(recipe, None), validate=lambda _: next(figures))
    metrics = make_trainer(task).fit()
    info, best = load_model(tmp_path / "run")
    assert info.metrics == metrics
    assert metrics["validation_accuracy"] == 0.9
    assert info.epoch == 2
    assert not identical(best.state_dict(), last_weights(tmp_path / "run"))


def test_it_stops_when_nothing_improves(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, epochs=50, patience=2, train_rows=16)
    task = dataclasses.replace(mobilenet.task(recipe, None), validate=lambda _: 0.5)
    trainer = make_trainer(task, recipe)
    trainer.fit()
    assert trainer.progress.epoch == 3
    assert trainer.progress.best_epoch == 1


def test_a_loss_that_is_not_finite_ends_the_run(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    task = dataclasses.replace(
        mobilenet.task(recipe, None), loss=lambda model, batch: model(batch[0].permute(0, 3, 1, 2) / 0).sum()
    )
    with pytest.raises(FloatingPointError, match="epoch 1: the loss is nan; lower --learning-rate"):
        make_trainer(task).fit()


def test_resuming_on_other_data_is_refused(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    make_trainer().fit()
    task = dataclasses.replace(mobilenet.task(recipe, None), dataset_sha256="f" * 64)
    with pytest.raises(CheckpointError, match="give the same --data-dir as before"):
        make_trainer(task).resume()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_norms_and_biases_are_not_decayed(recipe: mobilenet.Recipe, optimizer: Optimizer) -> None:
    recipe = dataclasses.replace(recipe, optimizer=optimizer, weight_decay=0.3)
    model = mobilenet.task(recipe, None).model
    groups = make_optimizer(model, recipe).param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == len(named)
    assert {decay[id(named[name])] for name in named if name.endswith("bias")} == {0.0}
    assert {decay[id(weight)] for weight in named.values() if weight.ndim == 4} == {0.3}


def test_the_rate_rises_then_falls_to_zero(recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, epochs=10, warmup_fraction=0.2, learning_rate=0.1)
    rates = [learning_rate(step, 10, recipe) for step in range(100)]
    assert 0 < rates[0] < 0.01
    assert rates.index(max(rates)) == 20
    assert max(rates) == pytest.approx(0.1)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(0.05)  # half of the cosine
    assert 0 < rates[99] < 1e-4
