"""Export a checkpoint to a model repository, quantized where that pays and checked against the original.

python -m export runs/mobilenet --to models
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from export.errors import ExportError
from export.passes.static_int8 import Target, this_target
from export.pipeline import export_checkpoint
from export.settings import ExportSettings
from train.checkpoint import CheckpointError
from train.data.download import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 1 after an error that was printed. (Wrong usage exits with 2.)
    """
    options = _parser().parse_args(arguments)
    try:
        results = export_checkpoint(_settings(options), _say)
    except (ExportError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for result in results:
        print(f"\n{summary(result.report)}\n")
        print(f"{'replaced' if result.replaced else 'wrote'} {result.folder}")
    print(f"next: onnxedge serve --model-repository {options.to}")
    return 0


def summary(report: Mapping[str, Any]) -> str:
    """A table of a report's figures, fp32 beside what is served where that is int8."""
    metric, sizes, latency = report["metric"], report["bytes"], report["latency_ms"]
    kinds = list(dict.fromkeys(("fp32", report["precision"])))
    rows = [
        ("", kinds, ""),
        (metric["name"], [_figure(metric["name"], metric[kind]) for kind in kinds], _change(metric, kinds)),
        (
            "size",
            [f"{sizes[kind] / 1e6:.2f} MB" for kind in kinds],
            f"x {sizes['ratio']:.2f}" if len(kinds) > 1 else "",
        ),
    ]
    for batch, medians in latency["batch"].items():
        faster = f"{medians['fp32'] / medians[kinds[-1]]:.2f} times as fast" if len(kinds) > 1 else ""
        rows.append((f"latency, batch {batch}", [f"{medians[kind]:.3f} ms" for kind in kinds], faster))
    lines = [
        f"{label:<18}{''.join(f'{cell:>12}' for cell in cells)}   {note}".rstrip()
        for label, cells, note in rows
    ]
    processor = latency["processor"]
    where = f"{latency['threads']} thread, {processor['model']}, dot products: {processor['dot_products']}"
    target = f"int8 for {report['target']}; " if len(kinds) > 1 else ""
    return "\n".join([f"{report['name']}", *lines, f"({target}{where})"])


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"


def _change(metric: Mapping[str, Any], kinds: Sequence[str]) -> str:
    if len(kinds) == 1:
        return f"on {metric['rows']} rows"
    if metric["name"] != "accuracy":
        return f"{metric['int8'] - metric['fp32']:+.4f} on {metric['rows']} rows"
    # Of the rounded figures: a reader subtracts those.
    points = round(100 * metric["int8"], 2) - round(100 * metric["fp32"], 2)
    return f"{points:+.2f} points on {metric['rows']} rows"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a checkpoint to a model repository, quantized to int8 where that pays.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, as python -m train wrote it")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="REPOSITORY", help="model repository to write to"
    )
    parser.add_argument("--name", help="name of the entry (default: the checkpoint's family)")
    parser.add_argument(
        "--version", type=int, default=1, help="version folder to write or replace (default: 1)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="points of 100 that int8 may lose of the family's metric (default: 0.5)",
    )
    parser.add_argument(
        "--target",
        choices=("auto", *get_args(Target)),
        default="auto",
        help="processor that the int8 graph is for (default: auto, the kind of this machine)",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the data set's files, instead of a download"
    )
    return parser


def _settings(options: argparse.Namespace) -> ExportSettings:
    return ExportSettings(
        checkpoint=options.checkpoint,
        repository=options.to,
        target=this_target() if options.target == "auto" else options.target,
        name=options.name,
        version=options.version,
        tolerance=options.tolerance,
        data_dir=options.data_dir,
    )


def _say(step: str) -> None:
    print(step, flush=True)


if __name__ == "__main__":
    sys.exit(main())
