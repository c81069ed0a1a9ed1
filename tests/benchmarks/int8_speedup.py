"""How much faster int8 is: MobileNetV2 of width 1.0 on 224-pixel images, untrained, one thread.

Timings are printed, not judged. Run: make bench.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from export.graph import export_graph
from export.latency import BATCHES, measure, processor
from export.passes.static_int8 import this_target
from export.quantization import quantize
from export.session import Session
from train import mobilenet
from train.image_classification import PixelInput, example_inputs

ARGUMENTS = {
    "classes": 1000,
    "channels": 3,
    "image_size": 224,
    "width": 1.0,
    "stem": "imagenet",
    "dropout": 0.2,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
CALIBRATION_ROWS = 32


def main() -> None:
    """Export both precisions, measure them side by side, print what came out."""
    torch.manual_seed(0)
    model = mobilenet.build_model(ARGUMENTS).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)  # else no convolution has a bias, which a trained one always has
    module = PixelInput(model, ARGUMENTS).eval()
    example = example_inputs(ARGUMENTS)
    (name, tensor), *_ = example.tensors.items()
    pixels = np.random.default_rng(0).integers(0, 256, (CALIBRATION_ROWS, *tensor.shape[1:]), dtype=np.uint8)

    graphs = quantize(export_graph(module, example), {name: pixels}, this_target(), "int8")
    sessions = {precision: Session(content) for precision, content in graphs.content.items()}
    sizes = {precision: len(content) for precision, content in graphs.content.items()}

    print(f"processor: {processor()}")
    print(f"bytes: fp32 {sizes['fp32']}, int8 {sizes['int8']}, x {sizes['int8'] / sizes['fp32']:.3f}")
    for batch in BATCHES:
        medians = measure(sessions, {name: pixels}, batch)
        fp32, int8 = medians["fp32"], medians["int8"]
        print(f"batch {batch}: fp32 {fp32:.2f} ms, int8 {int8:.2f} ms, {fp32 / int8:.2f} times as fast")


if __name__ == "__main__":
    main()
