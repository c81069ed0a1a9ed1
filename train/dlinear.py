"""DLinear, the linear forecaster that recurrent and attention networks are measured against.

Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, arXiv:2205.13504.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from train.forecasting import mean_errors

if TYPE_CHECKING:
    from train.forecasting import Windows

KERNEL = 25  # rows of the moving average, the paper's
BATCH = 32
LEARNING_RATE = 5e-3  # halved after each epoch, as the paper's script does for ETTh1
EPOCHS = 10
PATIENCE = 3


class DLinear(nn.Module):
    """FP32 [batch, context, columns] to [batch, horizon, columns]: a map of the trend and one of the rest.

    The trend is a moving average with the first and the last row repeated beyond the ends. All columns share
    both maps.
    """

    def __init__(self, context: int, horizon: int) -> None:
        super().__init__()
        self.trend = nn.Linear(context, horizon)
        self.seasonal = nn.Linear(context, horizon)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, horizon, columns]."""
        rows = series.transpose(1, 2)
        padded = functional.pad(rows, (KERNEL // 2, KERNEL // 2), mode="replicate")
        trend = functional.avg_pool1d(padded, KERNEL, stride=1)
        forecast: torch.Tensor = self.trend(trend) + self.seasonal(rows - trend)
        return forecast.transpose(1, 2)


def fit_dlinear(train: Windows, validation: Windows, seed: int) -> DLinear:
    """Fit by Adam on the squared error, on the CPU; the epoch that is best on validation counts.

    Torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DLinear(train.context, train.horizon)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    best, best_error, best_epoch = copy.deepcopy(model), float("inf"), 0
    for epoch in range(EPOCHS):
        for indices in torch.split(torch.randperm(len(train), generator=generator), BATCH):
            look_back, ahead = train.take(indices)
            optimizer.zero_grad()
            functional.mse_loss(model(look_back), ahead).backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
        halving.step()
        error = mean_errors(model, validation)["mse"]
        if error < best_error:
            best, best_error, best_epoch = copy.deepcopy(model), error, epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    return best
