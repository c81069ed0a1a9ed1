"""What a run was like, epoch by epoch: as a line on the terminal, as CSV, as a picture, for TensorBoard."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Row = dict[str, float]
"""One epoch: "epoch", "learning_rate", "train_loss", "validation_<metric>", "seconds"."""


def log_csv(rows: Sequence[Row]) -> bytes:
    """A line per epoch, below a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def curves_png(title: str, rows: Sequence[Row], lines: Mapping[str, float]) -> bytes:
    """The loss, the validation figure and the learning rate over the epochs, as a PNG picture.

    Args:
        title: above the picture.
        rows: the run's epochs, at least one.
        lines: label to a value of the metric, drawn across the validation figure: the test, the baselines.
    """
    metric = next(name for name in rows[0] if name.startswith("validation_"))
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(12, 3.6), layout="constrained")  # not pyplot's: that looks for a screen
    panels = figure.subplots(1, 3)
    for panel, name in zip(panels, ("train_loss", metric, "learning_rate"), strict=True):
        panel.plot(epochs, [row[name] for row in rows], marker="." if len(rows) < 60 else None)  # noqa: PLR2004 - dots would merge
        panel.set(xlabel="epoch", title=name.replace("_", " "))
        panel.grid(alpha=0.3)
    for index, (label, value) in enumerate(lines.items(), start=1):
        panels[1].axhline(value, color=f"C{index}", linestyle="--", label=f"{label} {value:.4g}")
    if lines:
        panels[1].legend(fontsize="small")
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


class TensorBoard:
    """Writes each epoch's figures as TensorBoard events: `tensorboard --logdir FOLDER` shows them.

    Args:
        folder: of this run alone; made when missing.
        epoch: finished epochs; what an earlier, killed run wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes a second; few runs ask for it

        self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def __call__(self, row: Row) -> None:
        """Write one epoch."""
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, int(row["epoch"]))
        self.writer.flush()
