"""`python -m export SOURCE --to models`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from export.errors import ExportError
from export.int8.calibration import Method
from export.pipeline import export
from export.recipes import Precision
from export.report import table
from export.settings import ExportSettings, GraphOptions
from export.source import EntryPointOptions, load_source
from export.targets import ACCELERATORS, Target, this_target

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION = """
Export a trained network to a model repository: ONNX graphs in the precisions that pay on the target, proven
to answer what PyTorch answers. SOURCE is a checkpoint folder of python -m train, or module:function (a dotted
module or a path to a .py file) that returns an nn.Module and its example inputs.

Other commands: python -m export compare A B; python -m export inspect model.onnx
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; see `export.__main__`."""
    parsed = _parser().parse_args(arguments)
    settings = _settings(parsed)
    options = EntryPointOptions.parse(
        parsed.dynamic, data=parsed.data, labels=parsed.labels, metric=parsed.metric, pixels=parsed.pixels
    )
    if len(parsed.source) > 1 and settings.name:
        raise ExportError(f"--name {settings.name}: one name for {len(parsed.source)} sources; export one")
    for text in parsed.source:
        source = load_source(text, settings.data_dir, options, _say)
        for result in export(source, settings, _say):
            print(f"\n{table(result.report)}\n")
            print(f"{'replaced' if result.replaced else 'wrote'} {result.folder}")
    print(f"next: onnxedge serve --model-repository {parsed.to}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="checkpoint folder, or module:function")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="REPOSITORY", help="model repository to write to"
    )
    parser.add_argument("--name", help="name of the entry (default: the family's or the module's)")
    parser.add_argument("--version", type=int, default=1, help="version to write or replace (default: 1)")
    _add_precision_flags(parser)
    _add_graph_flags(parser)
    _add_data_flags(parser)
    return parser


def _add_precision_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision")
    group.add_argument(
        "--target",
        choices=("auto", *get_args(Target)),
        default="auto",
        help="what the graphs will run on (default: auto, this machine)",
    )
    group.add_argument(
        "--precision",
        metavar="A[,B]",
        default="",
        help=f"write exactly these, the default first, or nothing if one of them can't be had: of "
        f"{', '.join(get_args(Precision))} (default: fp32 and what pays for the network and the target, as "
        "far as it is good enough; the fastest is the default)",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="N",
        help="how much of the metric may be lost: points of accuracy, per cent of an error or a perplexity "
        "(default: 0.5 points; 1 %%, of q8 0.5 %%, of q4 2 %%)",
    )
    group.add_argument(
        "--calibration",
        choices=get_args(Method),
        default="minmax",
        help="how int8 finds the ranges of activations (default: minmax)",
    )


def _add_graph_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the graph's ends")
    group.add_argument(
        "--native-size",
        action="store_true",
        help="images of the network's own size only, not of any size; always so for cuda and openvino",
    )
    group.add_argument(
        "--encoded-image",
        action="store_true",
        help="the server takes JPEG, PNG or WebP files and decodes them",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="answer the best K classes and scores too"
    )
    group.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="AXIS=SIZE",
        help="make a dynamic axis constant, for NPUs and TensorRT: batch=1, time=128; repeatable",
    )
    group.add_argument(
        "--max-batch-size",
        type=int,
        default=8,
        metavar="N",
        help="rows that a server may run at once (default: 8)",
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        type=Path,
        help="of a checkpoint: folder with the data set's files, instead of a download",
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="ROWS.npz",
        help="of module:function: rows by input name to calibrate and judge with, and their targets",
    )
    group.add_argument("--labels", type=Path, help="of module:function: class names, one a line")
    group.add_argument(
        "--metric",
        choices=("agreement", "cosine"),
        help="of module:function without targets: best class as PyTorch's, or likeness of the outputs "
        "(default: agreement for outputs [rows, classes], else cosine)",
    )
    group.add_argument(
        "--pixels",
        metavar="SCALING",
        help="of module:function: take UINT8 pixels [batch, height, width, channels] of any size instead of "
        "normalized images; none (0 to 255), unit (0 to 1), inception (-1 to 1), imagenet, or MEAN/STD of "
        "pixels from 0 to 1: 0.5,0.5,0.5/0.25,0.25,0.25",
    )
    group.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="INPUT:AXIS=NAME",
        help="of module:function: an axis that is dynamic besides the batch's; repeatable",
    )


def _settings(parsed: argparse.Namespace) -> ExportSettings:
    target = this_target() if parsed.target == "auto" else parsed.target
    return ExportSettings(
        repository=parsed.to,
        target=target,
        precisions=_precisions(parsed.precision),
        name=parsed.name,
        version=parsed.version,
        tolerance=parsed.tolerance,
        method=parsed.calibration,
        max_batch_size=parsed.max_batch_size,
        options=GraphOptions(
            # OpenVINO doesn't load the graph that resizes, and TensorRT builds none with branches.
            any_size=not parsed.native_size and target not in ACCELERATORS,
            encoded_image=parsed.encoded_image,
            top_k=parsed.top_k,
            fixed=_fixed(parsed.fix),
        ),
        data_dir=parsed.data_dir,
    )


def _precisions(text: str) -> Any:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in get_args(Precision):
            raise ExportError(f"--precision {name}: expected one of {', '.join(get_args(Precision))}")
    return names


def _fixed(items: Sequence[str]) -> dict[str, int]:
    fixed: dict[str, int] = {}
    for item in items:
        name, _, size = item.partition("=")
        if not name or not size.isdecimal():
            raise ExportError(f"--fix {item}: expected AXIS=SIZE, batch=1 for example")
        fixed[name] = int(size)
    return fixed


def _say(step: str) -> None:
    print(step, flush=True)
