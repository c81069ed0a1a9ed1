"""Which layers of a network suffer most from 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from export.int8.calibration import BATCH, batches, fixed_batch
from export.int8.quantizable import weighted_nodes, with_activation
from export.passes.static_int8 import quantize_nodes
from export.session import Session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.int8.calibration import Ranges
    from export.passes.static_int8 import Scheme

QUIETEST = 150.0
"""What a layer has that changes nothing at all; FP32 itself rounds at about this."""


@dataclass(frozen=True)
class LayerError:
    """What one layer in 8 bits does to the answer.

    Attributes:
        node: the layer's name in the prepared graph.
        operator: its operator.
        sqnr_db: signal to quantization noise at the graph's outputs in decibels, of the output where it is
            least; 20 is noise of a tenth of the signal's size. At most 150.
    """

    node: str
    operator: str
    sqnr_db: float


def layer_errors(
    prepared: ir.Model, ranges: Ranges, scheme: Scheme, rows: Mapping[str, np.ndarray]
) -> list[LayerError]:
    """Quantize each layer with weights alone, all others float, and compare the answers with fp32's.

    Args:
        prepared: from `export.int8.calibration.prepare`; stays as it is.
        ranges: what calibration found for it.
        scheme: how to round.
        rows: input name to rows [n, ...]; some 30 tell the layers apart.

    Returns:
        Every layer, the worst first.
    """
    exact = _answers(prepared, rows)
    errors = []
    for node in tqdm(weighted_nodes(prepared.graph), desc="compare layers", disable=None, leave=False):
        alone = [str(part.name) for part in with_activation(node)]
        rounded = _answers(quantize_nodes(prepared, alone, ranges, scheme), rows)
        noise = min(sqnr_db(array, rounded[name]) for name, array in exact.items())
        errors.append(LayerError(str(node.name), node.op_type, noise))
    return sorted(errors, key=lambda error: error.sqnr_db)


def _answers(model: ir.Model, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session, fixed = Session(ir.to_proto(model).SerializeToString()), fixed_batch(model)
    parts = [session.run(part) for part in batches(rows, fixed or BATCH, fill=fixed is not None)]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}


def sqnr_db(signal: np.ndarray, rounded: np.ndarray) -> float:
    """Power of a signal over that of its difference from another one, in decibels, at most 150.

    Outputs that aren't floating point count as exact where they are equal, as 0 dB where not.
    """
    if not np.issubdtype(signal.dtype, np.floating):
        return QUIETEST if np.array_equal(signal, rounded) else 0.0
    power = float(np.square(signal.astype(np.float64)).sum())
    noise = float(np.square(signal.astype(np.float64) - rounded).sum())
    if not math.isfinite(noise):
        return -QUIETEST
    if noise == 0:
        return QUIETEST
    return min(QUIETEST, 10 * math.log10(max(power, 1e-30) / noise))
