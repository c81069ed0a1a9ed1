"""What an update is made of: the optimizer, the learning rate of each step, penalties and the average."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from train.recipe import Recipe


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the linear layers, AdamW for all else, with one learning rate for both.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Its updates are scaled to
    the size that AdamW's have (Liu et al., arXiv:2502.16982), so that learning rates carry over.
    """

    def __init__(self, muon: list[nn.Parameter], others: list[dict[str, Any]], recipe: Recipe) -> None:
        super().__init__([*muon, *(weight for group in others for weight in group["params"])], {})
        rate, decay, betas = recipe.learning_rate, recipe.weight_decay, (0.9, recipe.beta2)
        self.parts = (
            torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=betas, fused=True),
        )
        self.share_groups()

    def share_groups(self) -> None:
        """Make this optimizer's groups those of its parts, where a change of the learning rate counts."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no closure here
        """Update all weights."""
        assert closure is None
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def state_dict(self) -> dict[str, Any]:
        """Both parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.share_groups()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, without weight decay on vectors and scalars: norms and biases.

    Raises:
        ValueError: the recipe asks for Muon and the network has no linear layers.
    """
    linear = linear_weights(model) if recipe.optimizer == "muon" else []
    taken = {id(weight) for weight in linear}
    weights = [weight for weight in model.parameters() if id(weight) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    if recipe.optimizer == "muon":
        recipe.require("optimizer", bool(linear), "adamw or sgd for a network without linear layers")
        return MuonAndAdamW(linear, groups, recipe)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of linear layers, but for one that is an embedding too."""
    modules = list(model.modules())
    embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
    return [cast("nn.Parameter", weight) for weight in weights if id(weight) not in embeddings]


def learning_rate(update: int, updates: int, recipe: Recipe) -> float:
    """The learning rate of one update of a run, counted from 0.

    A line up to the peak, then by `recipe.schedule`: half a cosine (Loshchilov, Hutter, arXiv:1608.03983) or
    a line down to the final fraction right after the last update, or steps, or nothing.
    """
    peak, warmup = recipe.learning_rate, round(recipe.warmup_fraction * updates)
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return peak
    if recipe.schedule == "step":
        return peak * recipe.step_factor ** int(update / (recipe.step_fraction * updates))
    done = (update - warmup) / (updates - warmup)
    left = (1 + math.cos(math.pi * done)) / 2 if recipe.schedule == "cosine" else 1 - done
    return peak * (recipe.final_fraction + (1 - recipe.final_fraction) * left)


def penalty(weights: Iterable[nn.Parameter], recipe: Recipe) -> torch.Tensor | None:
    """The recipe's L1 and L2 penalties, together an elastic net (Zou, Hastie 2005); None where it has none.

    Args:
        weights: all of a network's; vectors and scalars, norms and biases, are left out.
        recipe: `l1` times the sum of absolute values and half of `l2` times the sum of squares.

    Returns:
        A scalar to add to the loss.
    """
    if not recipe.l1 and not recipe.l2:
        return None
    matrices = [weight for weight in weights if weight.ndim > 1 and weight.requires_grad]
    absolute = torch.stack([weight.abs().sum() for weight in matrices]).sum()
    squares = torch.stack([weight.square().sum() for weight in matrices]).sum()
    return recipe.l1 * absolute + recipe.l2 / 2 * squares


def make_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights (Polyak, Juditsky 1992), buffers too; None for decay 0."""
    if not decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
