import copy
import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from train import mobilenet
from train.checkpoint import CURVES, LOG, CheckpointError, load_checkpoint, load_info, load_training_state
from train.device import mixed_type
from train.family import Metric, Task, Trivial
from train.history import TensorBoard
from train.loop import Trainer
from train.optimization import MuonAndAdamW, learning_rate, make_optimizer, penalty
from train.recipe import Optimizer, Schedule

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
    recipe = dataclasses.replace(recipe, label_smoothing=0.0, dropout=0.0, precision="float32")
    trainer = make_trainer(recipe=recipe)
    batch = next(trainer.task.batches(trainer.generator))
    trainer.model.train()
    first = float(trainer.train_step([batch], 0.01))
    for _ in range(60):
        last = float(trainer.train_step([batch], 0.01))
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
    assert load_info(tmp_path / "run").epoch == epoch - 1
    torch.manual_seed(99)  # a new process has drawn other numbers
    resumed = make_trainer()
    resumed.resume()
    assert resumed.fit() == whole
    assert identical(last_weights(tmp_path / "run"), last_weights(tmp_path / "whole"))
    best, expected = (load_checkpoint(tmp_path / name).model for name in ("run", "whole"))
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
    checkpoint = load_checkpoint(tmp_path / "run")
    info, best = checkpoint.info, checkpoint.model
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


@pytest.mark.parametrize(
    ("schedule", "half_way", "last"),
    [("cosine", 0.055, 0.01), ("linear", 0.055, 0.01), ("step", 0.01, 0.001), ("constant", 0.1, 0.1)],
)
def test_the_rate_rises_then_falls_as_the_schedule_says(
    recipe: mobilenet.Recipe, schedule: Schedule, half_way: float, last: float
) -> None:
    recipe = dataclasses.replace(
        recipe,
        warmup_fraction=0.2,
        learning_rate=0.1,
        schedule=schedule,
        final_fraction=0.1,
        step_fraction=0.4,
    )
    rates = [learning_rate(update, 1000, recipe) for update in range(1000)]
    assert 0 < rates[0] < 0.001
    assert rates[:200] == sorted(rates[:200])
    assert rates[200] == max(rates) == pytest.approx(0.1)
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[600] == pytest.approx(half_way)
    assert rates[999] == pytest.approx(last, rel=0.02)


def test_without_a_final_fraction_the_rate_ends_at_zero(recipe: mobilenet.Recipe) -> None:
    assert 0 < learning_rate(999, 1000, recipe) < 1e-5


def test_penalties_are_an_elastic_net_of_the_matrices(recipe: mobilenet.Recipe) -> None:
    weights = [nn.Parameter(torch.tensor([[1.0, -2.0]])), nn.Parameter(torch.tensor([100.0]))]
    assert penalty(weights, recipe) is None
    elastic = penalty(weights, dataclasses.replace(recipe, l1=0.1, l2=0.01))
    assert elastic is not None
    assert float(elastic.detach()) == pytest.approx(0.1 * 3 + 0.01 / 2 * 5)
    elastic.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    assert weights[0].grad is not None
    assert weights[0].grad[0].tolist() == pytest.approx([0.1 + 0.01, -0.1 - 0.02])
    assert weights[1].grad is None


def test_a_penalty_shrinks_the_weights(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    def size(trainer: Trainer) -> float:
        trainer.fit()
        return sum(float(w.detach().abs().sum()) for w in trainer.model.parameters() if w.ndim > 1)

    recipe = dataclasses.replace(recipe, weight_decay=0.0)
    free = size(make_trainer(recipe=recipe, out="free"))
    assert size(make_trainer(recipe=dataclasses.replace(recipe, l1=0.01), out="l1")) < 0.98 * free


def linear_task(recipe: mobilenet.Recipe) -> Task:
    """The recipe's data and a network without batch norm, whose gradients simply add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return dataclasses.replace(mobilenet.task(recipe, None), model=model, arguments={})


def test_accumulated_batches_are_one_larger_batch(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe
) -> None:
    recipe = dataclasses.replace(recipe, shift=0, flip=False, precision="float32", ema_decay=0.0)
    small = dataclasses.replace(recipe, batch_size=8, accumulate=2)
    one, two = (make_trainer(linear_task(r), r, out=name) for r, name in ((recipe, "one"), (small, "two")))
    assert one.updates == two.updates == 4
    one.train_epoch(1)
    two.train_epoch(1)
    for weight, other in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-6)


def test_muon_takes_the_linear_layers_and_leaves_the_rest_to_adamw(recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, optimizer="muon", weight_decay=0.3)
    embedding, tied = nn.Embedding(5, 4), nn.Linear(4, 5)
    tied.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4), nn.LayerNorm(4), tied)
    optimizer = make_optimizer(model, recipe)
    assert isinstance(optimizer, MuonAndAdamW)
    muon, adamw = ([id(w) for g in part.param_groups for w in g["params"]] for part in optimizer.parts)
    assert muon == [id(model[1].weight)]
    assert sorted(muon + adamw) == sorted(id(weight) for weight in model.parameters())
    decay = {id(w): g["weight_decay"] for g in optimizer.param_groups for w in g["params"]}
    assert {decay[id(weight)] for weight in model.parameters() if weight.ndim == 1} == {0.0}


def test_muon_without_linear_layers_is_refused(recipe: mobilenet.Recipe) -> None:
    with pytest.raises(ValueError, match="--optimizer: expected adamw or sgd for a network without linear"):
        make_optimizer(nn.Conv2d(1, 1, 1), dataclasses.replace(recipe, optimizer="muon"))


def test_muon_resumes_to_the_same_weights(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, optimizer="muon", precision="float32", ema_decay=0.0)
    one, two = (make_trainer(linear_task(recipe), recipe, out=name) for name in ("one", "two"))
    one.train_epoch(1)
    two.load_training_state(copy.deepcopy(one.training_state()))
    assert one.train_epoch(2) == two.train_epoch(2)
    assert identical(one.model.state_dict(), two.model.state_dict())
    assert {group["lr"] for group in two.optimizer.param_groups} == {one.optimizer.param_groups[0]["lr"]}


def test_more_accumulation_than_batches_is_refused(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe
) -> None:
    with pytest.raises(ValueError, match="--accumulate: expected at most an epoch's 4 batches, got 5"):
        make_trainer(recipe=dataclasses.replace(recipe, accumulate=5))


def test_the_running_average_is_what_is_judged_and_kept(
    make_trainer: MakeTrainer, recipe: mobilenet.Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, ema_decay=0.9, epochs=1)
    trainer = make_trainer(recipe=recipe)
    expected: dict[str, torch.Tensor] = {}
    step = trainer.train_step

    def watched(*arguments: Any) -> torch.Tensor:
        loss = step(*arguments)
        for name, weight in trainer.model.named_parameters():
            before = expected.get(name, weight.detach())
            expected[name] = 0.9 * before + 0.1 * weight.detach()
        return loss

    trainer.train_step = watched  # type: ignore[assignment, method-assign]  # the step as it is, and a look at it
    trainer.fit()
    kept = load_checkpoint(tmp_path / "run").model
    assert expected
    for name, weight in kept.named_parameters():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
    assert not identical(kept.state_dict(), last_weights(tmp_path / "run"))


def test_the_best_loss_is_the_lowest(make_trainer: MakeTrainer, recipe: mobilenet.Recipe) -> None:
    figures = iter([0.1, 0.9])
    loss = Metric("loss", higher_is_better=False, score=lambda _, __: 0.0)
    task = dataclasses.replace(
        mobilenet.task(recipe, None),
        metric=loss,
        validate=lambda _: next(figures),
        test=lambda _: {"loss": 0.5},
        trivial=Trivial("nothing", 1.0, 2.0),
        references=lambda: {"other": 3.0},
    )
    trainer = make_trainer(task)
    assert trainer.fit()["validation_loss"] == 0.1
    assert trainer.progress.best_epoch == 1
    assert load_info(trainer.out).metrics["test_loss"] == 0.5
    assert load_info(trainer.out).baselines == {"nothing": 2.0, "other": 3.0}


def test_the_log_and_the_curves_are_in_the_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.fit()
    with (tmp_path / "run" / LOG).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = rows[trainer.progress.best_epoch - 1]
    assert float(best["validation_accuracy"]) == trainer.progress.metrics["validation_accuracy"]
    with Image.open(tmp_path / "run" / CURVES) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_tensorboard_reads_what_was_written(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    events = EventAccumulator(str(tmp_path / "events"))
    trainer = make_trainer()
    trainer.observers = [TensorBoard(tmp_path / "events", 0)]
    trainer.fit()
    events.Reload()
    validation = events.Scalars("validation_accuracy")
    assert [event.step for event in validation] == [1, 2]
    assert validation[0].value == pytest.approx(trainer.progress.history[0]["validation_accuracy"])


def test_mixed_precision_is_left_out_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert mixed_type(cpu, "mixed") is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert mixed_type(cpu, "mixed") is torch.bfloat16
    assert mixed_type(cpu, "float32") is None
