"""What every forecaster of series shares: windows, their errors, and the answer that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from train.family import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from train.data.series import SeriesData, Split

    Forecast = Callable[[torch.Tensor], torch.Tensor]

EVALUATION_BATCH = 256
OTHER_LENGTHS = (1, 17, 200)


@dataclass(frozen=True)
class Windows:
    """Look-backs and what came after them, from a series that is z-scored by its train rows.

    Attributes:
        values: FP32 [rows, columns].
        starts: INT64 [n], the windows' first rows.
        context: rows to look back at.
        horizon: rows to forecast.
    """

    values: torch.Tensor
    starts: torch.Tensor
    context: int
    horizon: int

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """FP32 [n, context, columns] and [n, horizon, columns] of the windows at INT64 [n]."""
        rows = self.starts[indices][:, None] + torch.arange(self.context + self.horizon)
        window = self.values[rows]
        return window[:, : self.context], window[:, self.context :]


def make_windows(data: SeriesData, split: Split, context: int, horizon: int) -> Windows:
    """All windows of a split.

    Raises:
        train.data.download.DataError: the split is too short for one.
    """
    starts = torch.from_numpy(data.window_starts(split, context, horizon))
    mean, std = data.mean_and_std()
    return Windows(torch.from_numpy((data.values - mean) / std), starts, context, horizon)


@torch.no_grad()
def mean_errors(forecast: Forecast, windows: Windows, device: torch.device | None = None) -> dict[str, float]:
    """Mean squared and absolute error, "mse" and "mae", of z-scored values over all windows.

    Every window counts, also those of a last, smaller batch: dropping it has made published figures depend on
    the batch size (Qiu et al., "TFB", PVLDB 2024, arXiv:2403.20150).
    """
    squared = absolute = 0.0
    for indices in torch.split(torch.arange(len(windows)), EVALUATION_BATCH):
        look_back, ahead = windows.take(indices)
        error = forecast(look_back.to(device)).cpu() - ahead
        squared += float(error.square().sum(dtype=torch.float64))
        absolute += float(error.abs().sum(dtype=torch.float64))
    values = len(windows) * windows.horizon * windows.values.shape[1]
    return {"mse": squared / values, "mae": absolute / values}


def repeat_last(look_back: torch.Tensor, horizon: int) -> torch.Tensor:
    """The last of FP32 [n, context, columns] as FP32 [n, horizon, columns]."""
    return look_back[:, -1:].expand(-1, horizon, -1)


def make_metric(arguments: Mapping[str, Any]) -> Metric:
    """Mean squared error of z-scored values, from forecasts and targets in the data's own units."""
    std = np.array(arguments["std"], dtype=np.float32)

    def score(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        return float(np.square((outputs["forecast"] - targets) / std).mean(dtype=np.float64))

    return Metric("mse", higher_is_better=False, score=score, relative=True)


def raw_windows(
    data: SeriesData, split: Split, arguments: Mapping[str, Any], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """A split's windows, at most `rows`, evenly spread: FP32 [n, context, columns], [n, horizon, columns]."""
    context, horizon = arguments["context"], arguments["horizon"]
    starts = data.window_starts(split, context, horizon)
    count = min(rows, len(starts))
    chosen = starts[np.arange(count) * len(starts) // count]
    windows = data.values[chosen[:, None] + np.arange(context + horizon)]
    return windows[:, :context], windows[:, context:]


def other_lengths(data: SeriesData, arguments: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """Look-backs of 1, 17 and 200 rows, where the data has as many: FP32 [up to 4, any, columns]."""
    lengths = [length for length in OTHER_LENGTHS if length <= data.test_start]
    return tuple(raw_windows(data, "test", {**arguments, "context": length}, 4)[0] for length in lengths)
