"""The protocol's tensor datatypes beside numpy's, ONNX's and config.pbtxt's names for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DataType:
    """One row of the table.

    Attributes:
        name: the datatype string on the wire.
        dtype: numpy's dtype; BF16 travels as the uint16 that holds its bits, BYTES as objects of `bytes`.
        contents: field of InferTensorContents that holds it; None: raw bytes only (FP16, BF16).
        onnx: onnxruntime's type string of a tensor of it.
        config: DataType enum name in config.pbtxt.
    """

    name: str
    dtype: np.dtype
    contents: str | None
    onnx: str
    config: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for BYTES, whose elements differ."""
        return 0 if self.name == "BYTES" else self.dtype.itemsize


def _row(name: str, dtype: str, contents: str | None, onnx: str, config: str | None = None) -> DataType:
    # "<": the wire is little-endian whatever the machine is.
    return DataType(name, np.dtype(dtype), contents, f"tensor({onnx})", f"TYPE_{config or name}")


DATATYPES: dict[str, DataType] = {
    row.name: row
    for row in (
        _row("BOOL", "?", "bool_contents", "bool"),
        _row("UINT8", "u1", "uint_contents", "uint8"),
        _row("UINT16", "<u2", "uint_contents", "uint16"),
        _row("UINT32", "<u4", "uint_contents", "uint32"),
        _row("UINT64", "<u8", "uint64_contents", "uint64"),
        _row("INT8", "i1", "int_contents", "int8"),
        _row("INT16", "<i2", "int_contents", "int16"),
        _row("INT32", "<i4", "int_contents", "int32"),
        _row("INT64", "<i8", "int64_contents", "int64"),
        _row("FP16", "<f2", None, "float16"),
        _row("BF16", "<u2", None, "bfloat16"),
        _row("FP32", "<f4", "fp32_contents", "float"),
        _row("FP64", "<f8", "fp64_contents", "double"),
        _row("BYTES", "O", "bytes_contents", "string", "STRING"),
    )
}
BY_ONNX_TYPE = {row.onnx: row for row in DATATYPES.values()}
BY_CONFIG_NAME = {row.config: row for row in DATATYPES.values()}
