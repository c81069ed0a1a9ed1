"""The one training loop: schedule, clipping, mixed precision, early stopping, checkpoints, exact resume.

The checkpoint is written after every epoch. Its weights are those of the best epoch so far by the validation
figure; its training state is the last epoch's. So an exporter gets the best, and a resumed run goes on from
the last. An interrupted epoch is repeated from its start: what was drawn for it is drawn again, and the
weights come out as if nothing had happened.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from train.checkpoint import (
    CURVES,
    INFO,
    LOG,
    CheckpointError,
    CheckpointInfo,
    current_versions,
    load_checkpoint,
    load_info,
    load_training_state,
    require_replaceable,
    save_checkpoint,
)
from train.device import make_deterministic, mixed_type
from train.history import Row, curves_png, log_csv
from train.optimization import learning_rate, make_average, make_optimizer, penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from train.family import Task
    from train.recipe import Recipe

Batch = tuple[torch.Tensor, ...]


@dataclass
class Progress:
    """Where a run stands; part of the training state.

    Attributes:
        epoch: finished epochs.
        best_epoch: the one with the best validation figure so far.
        metrics: of the best epoch: "train_loss" and "validation_<metric>", and once all epochs are
            done "test_<figure>" for each.
        baselines: name to the metric on the test split, then too.
        history: all finished epochs.
    """

    epoch: int = 0
    best_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)


class Trainer:
    """One run: a task, a recipe, and the folder that its checkpoint goes to.

    Args:
        task: the network, its batches, loss and figures.
        recipe: how to optimize.
        out: checkpoint folder.
        family: the family's name, for the checkpoint.
        device: where the network is trained.
        observers: called with each finished epoch's figures.

    Raises:
        CheckpointError: `out` holds files that are not a checkpoint's.
        ValueError: an epoch has fewer batches than an update takes.

    Attributes:
        progress: where the run stands.
        saved: whether the checkpoint in `out` is this run's.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        out: Path,
        *,
        family: str,
        device: torch.device,
        observers: Sequence[Callable[[Row], None]] = (),
    ) -> None:
        require_replaceable(out)
        make_deterministic(device)
        self.task = task
        self.recipe = recipe
        self.out = out
        self.family = family
        self.device = device
        self.observers = observers
        self.updates = task.steps_per_epoch // recipe.accumulate
        recipe.require("accumulate", self.updates > 0, f"at most an epoch's {task.steps_per_epoch} batches")
        self.progress = Progress()
        self.saved = False
        self.model = task.model.to(device)
        self.average = make_average(self.model, recipe.ema_decay)
        self.best = copy.deepcopy(self.model)
        if recipe.compile and device.type == "cuda":
            self.model.compile()
        self.optimizer = make_optimizer(self.model, recipe)
        self.half = mixed_type(device, recipe.precision)
        # Only float16 has so few exponents that small gradients need it.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half == torch.float16)
        self.generator = torch.Generator().manual_seed(recipe.seed)

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the running average where the recipe asks for one."""
        return self.average.module if self.average else self.model

    def fit(self) -> dict[str, float]:
        """Train until the recipe's epochs are done or validation stops improving, then test the best weights.

        Returns:
            The metrics that the checkpoint has, see `Progress`.

        Raises:
            FloatingPointError: the loss is not finite.
            CheckpointError: the checkpoint can't be written; the one of before is intact.
            KeyboardInterrupt: Ctrl-C; the checkpoint is that of the last finished epoch, or the untrained
                network where none was finished and `out` holds no earlier run's checkpoint.
        """
        beginning = copy.deepcopy(self.training_state())
        try:
            while self.progress.epoch < self.recipe.epochs and not self.out_of_patience():
                self.run_epoch()
        except KeyboardInterrupt:
            if not self.saved and not (self.out / INFO).exists():
                self.load_training_state(beginning)
                self.save()
            raise
        self.finish()
        return self.progress.metrics

    def out_of_patience(self) -> bool:
        """Whether the last `patience` epochs brought nothing better."""
        return 0 < self.recipe.patience <= self.progress.epoch - self.progress.best_epoch

    def run_epoch(self) -> None:
        """Train one epoch, validate, keep the weights if they are the best, write the checkpoint."""
        started = time.perf_counter()
        epoch = self.progress.epoch + 1
        loss = self.train_epoch(epoch)
        if not math.isfinite(loss):
            raise FloatingPointError(f"epoch {epoch}: the loss is {loss}; lower --learning-rate")
        name = f"validation_{self.task.metric.name}"
        value = self.task.validate(self.judged)
        best = self.progress.metrics.get(name)
        self.progress.epoch = epoch
        if best is None or self.task.metric.gain(value, over=best) > 0:
            self.progress.best_epoch = epoch
            self.progress.metrics = {"train_loss": loss, name: value}
            self.best.load_state_dict(self.judged.state_dict())
        seconds = round(time.perf_counter() - started, 2)
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "learning_rate": rate, "train_loss": loss, name: value, "seconds": seconds}
        self.progress.history.append(row)
        self.save()
        for observe in self.observers:
            observe(row)

    def train_epoch(self, epoch: int) -> float:
        """Take an epoch's updates; the mean loss."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        with tqdm(
            desc=f"epoch {epoch}/{self.recipe.epochs}",
            total=self.updates,
            unit="update",
            leave=False,
            disable=None,  # no bar where the output is not a terminal
        ) as bar:
            for update, batches in enumerate(self.groups(), start=(epoch - 1) * self.updates):
                rate = learning_rate(update, self.recipe.epochs * self.updates, self.recipe)
                total += self.train_step(batches, rate)
                bar.update()
        return float(total) / self.updates

    def groups(self) -> Iterator[list[Batch]]:
        """An epoch's batches, as many at a time as an update takes; what is left over is dropped."""
        batches = self.task.batches(self.generator)
        for _ in range(self.updates):
            yield list(islice(batches, self.recipe.accumulate))

    def train_step(self, batches: Sequence[Batch], rate: float) -> torch.Tensor:
        """One update at this learning rate; the mean loss before it, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch) / len(batches)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += loss.detach()
        if (extra := penalty(self.model.parameters(), self.recipe)) is not None:
            self.scaler.scale(extra).backward()  # type: ignore[no-untyped-call]  # as above
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.model)
        return total

    def loss(self, batch: Batch) -> torch.Tensor:
        """The task's loss of one batch of CPU tensors, with 16-bit products where the recipe has them."""
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            return self.task.loss(self.model, batch)

    def finish(self) -> None:
        """Test the best weights, and write the checkpoint once more with the figures and the curves."""
        scores = self.task.test(self.best)
        name, trivial = self.task.metric.name, self.task.trivial
        self.progress.metrics |= {f"test_{key}": value for key, value in scores.items()}
        self.progress.baselines = {trivial.name: trivial.test, **self.task.references()}
        lines = {f"test {name}": scores[name], trivial.name: trivial.test}
        picture = curves_png(f"{self.family} on {self.task.dataset}", self.progress.history, lines)
        self.save({CURVES: picture})

    def save(self, files: dict[str, bytes] | None = None) -> None:
        """Write the checkpoint folder, with these files besides the log and the task's own."""
        task, progress = self.task, self.progress
        info = CheckpointInfo(
            family=self.family,
            model=task.arguments,
            recipe=asdict(self.recipe),
            metrics=progress.metrics,
            baselines=progress.baselines,
            dataset=task.dataset,
            dataset_sha256=task.dataset_sha256,
            seed=self.recipe.seed,
            epoch=progress.epoch,
            versions=current_versions(),
        )
        files = {LOG: log_csv(progress.history), **task.files, **(files or {})}
        save_checkpoint(self.out, info, self.best, self.training_state(), files)
        self.saved = True

    def resume(self) -> None:
        """Go on from the checkpoint in `out`.

        Raises:
            CheckpointError: there is none, or it is damaged, or of another family or other data.
        """
        info = load_info(self.out, family=self.family)
        if info.dataset_sha256 != self.task.dataset_sha256:
            raise CheckpointError(
                f"{self.out}: was trained on {info.dataset} ({info.dataset_sha256[:12]}), but this run reads "
                f"{self.task.dataset} ({self.task.dataset_sha256[:12]}); give the same --data-dir as before"
            )
        state = load_training_state(self.out)  # before anything is changed: it may be damaged
        self.best.load_state_dict(load_checkpoint(self.out).model.state_dict())
        self.load_training_state(state)
        self.saved = True

    def training_state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, but the recipe and the data."""
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` returned, on this or another device."""
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
