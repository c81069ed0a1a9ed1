"""LSTM, GRU and plain recurrent networks that forecast multivariate series, and go on from a kept state.

Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997. Every column is forecast by
itself with shared weights: Nie et al., "A Time Series is Worth 64 Words", ICLR 2023, arXiv:2211.14730.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from train.data.series import SPLITS, load_series_data
from train.dlinear import fit_dlinear
from train.family import ExampleInputs, ServingData, ServingGraph, Task, Trivial
from train.forecasting import make_metric, make_windows, mean_errors, other_lengths, raw_windows, repeat_last
from train.recipe import Recipe as BaseRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np

    from train.checkpoint import Checkpoint
    from train.data.series import SeriesData
    from train.family import Scores
    from train.forecasting import Windows

CALIBRATION_ROWS = 512
HELD_OUT_ROWS = 4000  # all of ETT's; of a long table they would fill the memory
STEP_ROWS = 1000
FIRST_LOSS_WINDOWS = 1000

DataSet = Literal["etth1", "etth2", "csv"]
Cell = Literal["lstm", "gru", "rnn"]
Loss = Literal["mse", "l1", "huber"]
State = tuple[torch.Tensor, ...]

CELLS: Mapping[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
LOSSES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
}


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """How to train a forecaster."""

    data: Annotated[DataSet, "data set; csv is any table, see --csv"] = "etth1"
    sample: Annotated[bool, "use the repository's copy, which is all of etth1, instead of downloading"] = True
    csv: Annotated[str, "of --data csv: a table with a line of column names, in order of time"] = ""
    time_column: Annotated[str, "of --data csv: the column that is left out; the first unless named"] = ""
    cell: Annotated[Cell, "kind of recurrent cell; rnn is the plain one with tanh"] = "lstm"
    hidden: Annotated[int, "width of the state, per column of the series"] = 64
    layers: Annotated[int, "recurrent layers"] = 1
    context: Annotated[int, "rows to look back at"] = 96
    horizon: Annotated[int, "rows to forecast"] = 96
    dropout: Annotated[float, "between the recurrent layers and before the last layer"] = 0.1
    loss: Annotated[Loss, "what training minimizes; validation and test always give mse"] = "mse"
    epoch_windows: Annotated[int, "windows drawn for an epoch; 0 is all that the train split has"] = 0

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        self.require("csv", not self.csv or self.data == "csv", "nothing without --data csv")
        for name in ("hidden", "layers", "horizon"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("context", self.context > 1, "at least 2")
        self.require("dropout", 0 <= self.dropout < 1, "from 0 to below 1")
        self.require(
            "epoch_windows",
            self.epoch_windows == 0 or self.epoch_windows >= self.batch_size,
            "0 or at least a batch",
        )


# On the absolute error quick reaches validation mse 0.72, on the squared error 0.73 (test 0.418 and 0.439).
# cpu is best after three epochs, 0.69 (test 0.419): longer training overfits.
RECIPES = {
    "quick": Recipe(
        epochs=3, batch_size=32, epoch_windows=4800, learning_rate=5e-3, loss="l1", precision="float32"
    ),
    "cpu": Recipe(
        epochs=12,
        batch_size=32,
        learning_rate=3e-3,
        ema_decay=0.99,
        dropout=0.2,
        loss="l1",
        patience=4,
        precision="float32",
    ),
    # Not measured. Not compiled either: cuDNN runs a recurrent layer as one call already.
    "reference": Recipe(
        epochs=60,
        batch_size=64,
        hidden=256,
        context=336,
        dropout=0.3,
        ema_decay=0.999,
        loss="l1",
        patience=10,
        precision="float32",
    ),
}


class Forecaster(nn.Module):
    """Z-scored FP32 [batch, context, columns] to z-scored FP32 [batch, horizon, columns].

    Each column runs through the same cell as a row of its own: on ETTh1 at 96 to 96, after 300 batches of 64
    windows, mse 0.50 against 0.69 for one cell that reads all columns. The answer is the last value plus what
    the head makes of the state, so that it starts as the last value and needs nothing but the past.
    """

    def __init__(
        self, cell: str, *, hidden: int, layers: int, horizon: int, columns: int, dropout: float
    ) -> None:
        super().__init__()
        self.columns = columns
        between = dropout if layers > 1 else 0.0
        self.cell = CELLS[cell](1, hidden, layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, horizon)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, horizon, columns]."""
        return self.advance(series)[0]

    def advance(self, series: torch.Tensor, state: State = ()) -> tuple[torch.Tensor, State]:
        """Read rows after those that `state` has read.

        Args:
            series: FP32 [batch, any, columns].
            state: what the last call returned; none before the first row.

        Returns:
            The forecast from the last row on, FP32 [batch, horizon, columns]; and the state after it, a
            tensor, or of an LSTM two, FP32 [batch, layers, columns, hidden].
        """
        rows = series.transpose(0, 1).flatten(1).unsqueeze(2)  # each column a row of the batch
        before = tuple(tensor.transpose(0, 1).flatten(1, 2).contiguous() for tensor in state)
        _, after = self.cell(rows, before if len(before) > 1 else next(iter(before), None))
        after = after if isinstance(after, tuple) else (after,)
        last = self.dropout(after[0][-1])  # the last layer's
        change = self.head(last).unflatten(0, (-1, self.columns)).transpose(1, 2)
        kept = tuple(tensor.unflatten(1, (-1, self.columns)).transpose(0, 1) for tensor in after)
        return series[:, -1:] + change, kept


class SeriesInput(nn.Module):
    """A forecaster behind the series that a client sends, in its own units: z-scores inside the graph."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Forecaster, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(arguments["mean"]))
        self.register_buffer("std", torch.tensor(arguments["std"]))

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, context, columns] to FP32 [batch, horizon, columns]."""
        forecast: torch.Tensor = self.model((series - self.mean) / self.std)
        return forecast * self.std + self.mean


class StepInput(SeriesInput):
    """The same for a client that sends row after row and keeps the state; zeros before the first row."""

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor | None = None) -> State:  # type: ignore[override]  # a graph of its own
        """FP32 [batch, columns] and a state to FP32 [batch, horizon, columns] and the next state."""
        series = ((x - self.mean) / self.std).unsqueeze(1)
        forecast, after = self.model.advance(series, (h,) if c is None else (h, c))
        return forecast * self.std + self.mean, *after


def build_model(arguments: Mapping[str, Any]) -> Forecaster:
    """The untrained network for a checkpoint's model arguments, initialized from torch's global generator."""
    model = Forecaster(
        arguments["cell"],
        hidden=arguments["hidden"],
        layers=arguments["layers"],
        horizon=arguments["horizon"],
        columns=len(arguments["columns"]),
        dropout=arguments["dropout"],
    )
    for name, weight in model.cell.named_parameters():
        gates = weight.detach().chunk(len(weight) // arguments["hidden"])
        for gate in gates:
            if name.startswith("weight_ih"):
                nn.init.xavier_uniform_(gate)
            elif name.startswith("weight_hh"):
                nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(gate)
        if arguments["cell"] == "lstm" and name.startswith("bias_ih"):
            # The second gate forgets; open at first, it lets gradients reach far back: Jozefowicz et al., "An
            # Empirical Exploration of Recurrent Network Architectures", ICML 2015.
            nn.init.ones_(gates[1])
    # Next to nothing, so that the first answer is the last value.
    nn.init.xavier_uniform_(model.head.weight, gain=0.01)
    nn.init.zeros_(model.head.bias)
    return model


def series_arguments(data: SeriesData) -> dict[str, Any]:
    """The model arguments that follow from the data; mean and std are per column, of the train rows."""
    mean, std = data.mean_and_std()
    return {"columns": list(data.columns), "mean": mean.tolist(), "std": std.tolist()}


def load_data(recipe: Recipe, data_dir: Path | None) -> SeriesData:
    """The data set that the recipe names.

    Raises:
        train.data.download.DataError: it can't be read.
    """
    return load_series_data(
        recipe.data,
        data_dir=data_dir,
        sample=recipe.sample,
        csv_file=recipe.csv,
        time_column=recipe.time_column,
    )


def task(recipe: Recipe, data_dir: Path | None) -> Task:
    """A training run of this recipe, its first weights drawn from the recipe's seed.

    Raises:
        train.data.download.DataError: the data set can't be read, or is too short for the recipe's windows.
    """
    data = load_data(recipe, data_dir)
    names = ("cell", "hidden", "layers", "context", "horizon", "dropout")
    arguments = series_arguments(data) | {name: getattr(recipe, name) for name in names}
    train, validation, test = (make_windows(data, split, recipe.context, recipe.horizon) for split in SPLITS)
    drawn = min(recipe.epoch_windows or len(train), len(train))

    def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        order = torch.randperm(len(train), generator=generator)[:drawn]
        yield from map(train.take, torch.split(order, recipe.batch_size))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        look_back, ahead = batch
        return LOSSES[recipe.loss](model(look_back).float(), ahead)

    def last_value(look_back: torch.Tensor) -> torch.Tensor:
        return repeat_last(look_back, recipe.horizon)

    def references() -> Scores:
        dlinear = mean_errors(fit_dlinear(train, validation, recipe.seed), test)
        return {f"dlinear_{name}": value for name, value in dlinear.items()} | {
            "last_value_mae": mean_errors(last_value, test)["mae"]
        }

    look_back, ahead = train.take(torch.arange(FIRST_LOSS_WINDOWS) * len(train) // FIRST_LOSS_WINDOWS)
    torch.manual_seed(recipe.seed)
    return Task(
        model=build_model(arguments),
        arguments=arguments,
        dataset=data.name,
        dataset_sha256=data.sha256(),
        steps_per_epoch=-(-drawn // recipe.batch_size),
        batches=batches,
        loss=loss,
        first_loss=float(LOSSES[recipe.loss](last_value(look_back), ahead)),
        metric=make_metric(arguments),
        validate=lambda model: evaluate(model, validation)["mse"],
        test=lambda model: evaluate(model, test),
        trivial=Trivial(
            "last value", mean_errors(last_value, validation)["mse"], mean_errors(last_value, test)["mse"]
        ),
        references=references,
    )


def evaluate(model: nn.Module, windows: Windows) -> dict[str, float]:
    """Mean squared and absolute error over all windows; the model is left in eval mode."""
    return mean_errors(model.eval(), windows, next(model.parameters()).device)


def serving_graphs(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
    """The whole look-back at once, and "_step": row after row with the state as input and output.

    The first takes "series" FP32 [batch, time, columns] of any length. The second takes "x" FP32 [batch,
    columns] and "h", of an LSTM also "c", FP32 [batch, layers, columns, hidden], and answers "h_out" and
    "c_out" too; it is judged after context - 1 rows from zeros. Both answer "forecast" FP32 [batch, horizon,
    columns], in the data's own units.

    Raises:
        ValueError: the checkpoint's recipe is of another version.
        train.data.download.DataError: the data set can't be read.
    """
    recipe = Recipe.from_mapping(checkpoint.info.recipe)
    arguments = checkpoint.info.model
    data = load_data(recipe, data_dir)
    model = checkpoint.model
    assert isinstance(model, Forecaster)
    fitted, _ = raw_windows(data, "train", arguments, CALIBRATION_ROWS)
    whole, targets = raw_windows(data, "test", arguments, HELD_OUT_ROWS)
    some, some_targets = raw_windows(data, "test", arguments, STEP_ROWS)
    others = tuple({"series": rows} for rows in other_lengths(data, arguments))
    series = SeriesInput(model, arguments).eval()
    step = StepInput(model, arguments).eval()
    calibration = step_inputs(step, fitted)
    state = [name for name in calibration if name != "x"]
    metric = make_metric(arguments)
    return (
        ServingGraph(
            suffix="",
            module=series,
            example=example_inputs({"series": fitted}, ("forecast",)),
            data=ServingData({"series": fitted}, {"series": whole}, targets, other_shapes=others),
            metric=metric,
        ),
        ServingGraph(
            suffix="_step",
            module=step,
            example=example_inputs(calibration, ("forecast", *(f"{name}_out" for name in state))),
            data=ServingData(calibration, step_inputs(step, some), some_targets),
            metric=metric,
        ),
    )


@torch.no_grad()
def step_inputs(step: StepInput, look_back: np.ndarray) -> dict[str, np.ndarray]:
    """The last row of FP32 [n, context, columns], and the state that the rows before it leave behind."""
    series = torch.from_numpy(look_back)
    _, state = step.model.advance((series[:, :-1] - step.mean) / step.std)
    names = ("h", "c")[: len(state)]
    kept = {name: tensor.contiguous().numpy() for name, tensor in zip(names, state, strict=True)}
    return {"x": look_back[:, -1], **kept}


def example_inputs(rows: Mapping[str, np.ndarray], outputs: tuple[str, ...]) -> ExampleInputs:
    """The first two rows, FP32 [2, ...] each; of "series" time is dynamic too."""
    tensors = {name: torch.from_numpy(array[:2].copy()) for name, array in rows.items()}
    axes = {name: {0: "batch", 1: "time"} if name == "series" else {0: "batch"} for name in tensors}
    return ExampleInputs(tensors, axes, outputs)
