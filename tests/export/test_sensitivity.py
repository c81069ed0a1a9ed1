"""The layer that suffers most is found, and leaving it float helps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from export.int8.calibration import calibrate, prepare
from export.int8.quantizable import weighted_nodes
from export.int8.sensitivity import layer_errors, sqnr_db
from export.passes.static_int8 import SCHEMES, StaticInt8
from export.session import Session, take

if TYPE_CHECKING:
    from tests.export.conftest import Network

SPOILED = 20
SCHEME = SCHEMES["x86-vnni"]


def spoil(model: ir.Model) -> str:
    """Make one channel of one layer a thousand times as large, undone in the next layer."""
    layers = [node for node in weighted_nodes(model.graph) if node.op_type == "Conv"]
    followers = (
        (layer, user)
        for layer in layers[SPOILED:]
        for user in layer.outputs[0].consumers()
        if user.op_type == "Conv" and len(layer.outputs[0].consumers()) == 1
    )
    layer, follower = next(followers)
    for node, axis, factor in ((layer, 0, 1000), (follower, 1, 1 / 1000)):
        for value in node.inputs[1 : 3 if axis == 0 else 2]:
            assert value is not None
            assert value.const_value is not None
            array = value.const_value.numpy().copy()
            array[(slice(None),) * axis + (0,)] *= factor
            value.const_value = ir.tensor(array, name=value.name)
    return str(layer.name)


def test_a_spoiled_layer_is_found_and_left_float(network: Network) -> None:
    model = prepare(network.graph.clone())
    rows = take(network.data.calibration, 0, 64)
    healthy = layer_errors(model, calibrate(model, rows, "minmax"), SCHEME, take(rows, 0, 8))
    name = spoil(model)
    ranges = calibrate(model, rows, "minmax")
    errors = layer_errors(model, ranges, SCHEME, take(rows, 0, 8))
    noises = [error.sqnr_db for error in errors]
    assert noises == sorted(noises)
    assert {error.node for error in errors} == {node.name for node in weighted_nodes(model.graph)}
    assert {error.operator for error in errors} == {"Conv", "Gemm"}
    before, after = ({error.node: error.sqnr_db for error in found} for found in (healthy, errors))
    # What it gives is rounded, and so is what its follower takes: the same numbers.
    assert name in {error.node for error in errors[:2]}
    assert after[name] < before[name] - 10
    unaffected = [layer for layer in before if abs(after[layer] - before[layer]) < 3]
    assert len(unaffected) >= len(before) - 3

    exact = Session(ir.to_proto(model).SerializeToString()).run(rows)["logits"]
    worst = frozenset(error.node for error in errors[:2])
    noise = {
        exclude: sqnr_db(exact, Session(ir.to_proto(rounded).SerializeToString()).run(rows)["logits"])
        for exclude in (frozenset[str](), worst)
        for rounded in [StaticInt8(ranges, SCHEME, exclude).apply(model).model]
    }
    assert noise[worst] > noise[frozenset()] + 6


def test_noise_is_measured_in_decibels() -> None:
    signal = np.array([3, 4], np.float32)
    assert sqnr_db(signal, signal * np.float32(1.1)) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(signal, signal) == 150
    assert sqnr_db(signal, np.array([3, math.nan], np.float32)) == -150
    assert sqnr_db(np.array([1, 2]), np.array([1, 2])) == 150
    assert sqnr_db(np.array([1, 2]), np.array([1, 3])) == 0
