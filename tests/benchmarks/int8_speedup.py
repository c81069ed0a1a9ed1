"""How much faster and smaller static int8 is, untrained networks of the usual sizes, one thread.

Images of 224 pixels, texts of 128 tokens. Timings are printed, not judged. Run: make bench.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from export.graph import export_graph, serialize
from export.int8.calibration import calibrate, prepare
from export.latency import BATCHES, measure
from export.passes.clean_up import CleanUp
from export.passes.flatten_normalization import FlattenNormalization
from export.passes.static_int8 import SCHEMES, StaticInt8
from export.session import Session
from export.targets import Target, processor, this_target
from train import bert, mobilenet, resnet
from train.bert_classification import ServedClassifier
from train.image_classification import PixelInput
from train.image_classification import example_inputs as example_pixels
from train.sentence_classification import example_inputs as example_tokens
from train.sentence_classification import padded_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.family import ExampleInputs

ROWS = 32
TOKENS = 128
IMAGENET = {
    "classes": 1000,
    "channels": 3,
    "image_size": 224,
    "width": 1.0,
    "stem": "imagenet",
    "dropout": 0.2,
    "zero_residual": False,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# BERT mini: Turc et al., arXiv:1908.08962, with the normalization that trains from nothing.
MINI = {
    "classes": 2,
    "vocabulary": 30522,
    "layers": 4,
    "heads": 4,
    "width": 256,
    "context": 512,
    "norm": "pre",
    "pooling": "mean",
    "dropout": 0.1,
    "guesses_words": False,
}


@dataclass(frozen=True)
class Case:
    """A network to measure, and rows for it."""

    name: str
    module: nn.Module
    example: ExampleInputs
    rows: Mapping[str, np.ndarray]


def main() -> None:
    """Export both precisions of each network, measure them side by side, print what came out."""
    target = this_target()
    print(f"processor: {processor()}, target {target}")
    for case in (
        image_case("MobileNetV2", mobilenet, {"version": "v2"}),
        image_case("MobileNetV3-small", mobilenet, {"version": "v3-small"}),
        image_case("ResNet-18", resnet, {"depth": "18"}),
        text_case("BERT mini", MINI),
        text_case("BERT base", {**MINI, "layers": 12, "heads": 12, "width": 768}),
    ):
        report(case, target)


def image_case(name: str, family: Any, changes: Mapping[str, Any]) -> Case:
    """A network of pixels, uniformly random ones."""
    arguments = {**IMAGENET, **changes}
    module = PixelInput(untrained(family, arguments), arguments).eval()
    example = example_pixels(arguments)
    (input_name, tensor), *_ = example.tensors.items()
    shape = (ROWS, *tensor.shape[1:])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Case(name, module, example, {input_name: pixels})


def text_case(name: str, arguments: Mapping[str, Any]) -> Case:
    """A network of tokens, uniformly random ones."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, arguments["vocabulary"], TOKENS) for _ in range(ROWS)]
    example = example_tokens(arguments["vocabulary"], arguments["context"])
    model = untrained(bert, arguments)
    return Case(name, ServedClassifier(model).eval(), example, padded_inputs(rows, TOKENS))


def untrained(family: Any, arguments: Mapping[str, Any]) -> Any:
    """A network none of whose biases is 0, as in a trained one: zeros are left out or shared."""
    torch.manual_seed(0)
    model = family.build_model(arguments).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def graphs(case: Case, target: Target) -> dict[str, bytes]:
    """The network's graphs by precision."""
    fp32 = export_graph(case.module, case.example)
    flatten = FlattenNormalization()
    if flatten.check(fp32) is None:
        fp32 = flatten.apply(fp32).model
    prepared = prepare(fp32.clone())
    ranges = calibrate(prepared, case.rows, "minmax")
    int8 = CleanUp().apply(StaticInt8(ranges, SCHEMES[target]).apply(prepared).model).model
    return {"fp32": serialize(fp32), "int8": serialize(int8)}


def report(case: Case, target: Target) -> None:
    """Print sizes and latencies of one network."""
    content = graphs(case, target)
    part = len(content["int8"]) / len(content["fp32"])
    print(f"{case.name}: {len(content['fp32'])} to {len(content['int8'])} bytes, x {part:.3f}")
    sessions = {precision: Session(graph) for precision, graph in content.items()}
    for batch in BATCHES:
        medians = measure(sessions, case.rows, batch)
        before, after = medians["fp32"], medians["int8"]
        print(
            f"  batch {batch}: fp32 {before:.2f} ms, int8 {after:.2f} ms, {before / after:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
