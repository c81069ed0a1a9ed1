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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from train.checkpoint import (
    INFO,
    CheckpointError,
    CheckpointInfo,
    current_versions,
    load_info,
    load_model,
    load_training_state,
    require_replaceable,
    save_checkpoint,
)

if TYPE_CHECKING:
    from pathlib import Path

    from train.family import Task
    from train.recipe import Recipe


@dataclass
class Progress:
    """Where a run stands; part of the training state.

    Attributes:
        epoch: finished epochs.
        best_epoch: the one with the best validation figure so far.
        metrics: of the best epoch: "train_loss" and "validation_<metric>", and once all epochs are
            done "test_<metric>".
    """

    epoch: int
    best_epoch: int
    metrics: dict[str, float]


class Trainer:
    """One run: a task, a recipe, and the folder that its checkpoint goes to.

    Args:
        task: the network, its batches, loss and figures.
        recipe: how to optimize.
        out: checkpoint folder.
        family: the family's name, for the checkpoint.
        metric: the name of what `task.validate` and `task.test` return.
        device: where the network is trained; mixed precision is used on "cuda" only.

    Raises:
        CheckpointError: `out` holds files that are not a checkpoint's.

    Attributes:
        progress: where the run stands.
        saved: whether the checkpoint in `out` is this run's.
    """

    def __init__(
        self, task: Task, recipe: Recipe, out: Path, *, family: str, metric: str, device: torch.device
    ) -> None:
        require_replaceable(out)
        make_deterministic(device)
        self.task = task
        self.recipe = recipe
        self.out = out
        self.family = family
        self.metric = metric
        self.device = device
        self.progress = Progress(epoch=0, best_epoch=0, metrics={})
        self.saved = False
        self.model = task.model.to(device)
        self.best = copy.deepcopy(self.model)
        self.optimizer = make_optimizer(self.model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def fit(self) -> dict[str, float]:
        """Train until the recipe's epochs are done or validation stops improving, then test the best weights.

        Returns:
            The metrics that the checkpoint has, see `Progress`.

        Raises:
            FloatingPointError: the loss is not finite.
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
        self.progress.metrics[f"test_{self.metric}"] = self.task.test(self.best)
        self.save()
        return self.progress.metrics

    def out_of_patience(self) -> bool:
        """Whether the last `patience` epochs brought nothing better."""
        waited = self.progress.epoch - self.progress.best_epoch
        return 0 < self.recipe.patience <= waited

    def run_epoch(self) -> None:
        """Train one epoch, validate, keep the weights if they are the best, write the checkpoint."""
        started = time.perf_counter()
        epoch = self.progress.epoch + 1
        loss = self.train_epoch(epoch)
        if not math.isfinite(loss):
            raise FloatingPointError(f"epoch {epoch}: the loss is {loss}; lower --learning-rate")
        name = f"validation_{self.metric}"
        value = self.task.validate(self.model)
        better = value > self.progress.metrics.get(name, -math.inf)
        self.progress.epoch = epoch
        if better:
            self.progress.best_epoch = epoch
            self.progress.metrics = {"train_loss": loss, name: value}
            self.best.load_state_dict(self.model.state_dict())
        self.save()
        print(
            f"epoch {epoch:3}/{self.recipe.epochs}  loss {loss:.4f}  validation {self.metric} {value:.4f}"
            f"{' (best)' if better else '       '}  {time.perf_counter() - started:.1f} s",
            flush=True,
        )

    def train_epoch(self, epoch: int) -> float:
        """Take `steps_per_epoch` steps; the mean loss."""
        self.model.train()
        steps = self.task.steps_per_epoch
        total = torch.zeros((), device=self.device)
        # disable=None: no bar where the output is not a terminal; the line per epoch is there always.
        bar = tqdm(
            self.task.batches(self.generator),
            total=steps,
            desc=f"epoch {epoch}/{self.recipe.epochs}",
            unit="batch",
            leave=False,
            disable=None,
        )
        for step, batch in enumerate(bar, start=(epoch - 1) * steps):
            total += self.train_step(batch, learning_rate(step, steps, self.recipe))
        return float(total) / steps

    def train_step(self, batch: tuple[torch.Tensor, ...], rate: float) -> torch.Tensor:
        """One update at this learning rate; the loss before it, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"):
            loss = self.task.loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def save(self) -> None:
        """Write the checkpoint folder."""
        info = CheckpointInfo(
            family=self.family,
            model=self.task.arguments,
            recipe=asdict(self.recipe),
            metrics=self.progress.metrics,
            dataset=self.task.dataset,
            dataset_sha256=self.task.dataset_sha256,
            seed=self.recipe.seed,
            epoch=self.progress.epoch,
            versions=current_versions(),
        )
        save_checkpoint(self.out, info, self.best, self.training_state())
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
        state = load_training_state(self.out)
        self.best.load_state_dict(load_model(self.out)[1].state_dict())
        self.load_training_state(state)
        self.saved = True

    def training_state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, but the recipe and the data."""
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
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
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, without weight decay on vectors and scalars: norms and biases."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def learning_rate(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Linear warm-up to the recipe's rate, then half a cosine that ends at zero after its last step."""
    steps = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_fraction * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def make_deterministic(device: torch.device) -> None:
    """Same seed, same weights on a CPU; on a GPU speed comes first."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.backends.cudnn.benchmark = device.type == "cuda"
