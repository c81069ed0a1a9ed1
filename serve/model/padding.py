"""Rows of different lengths in one batch: padded, where a model says that it hides the padding.

A model declares it in the parameters of its config.pbtxt:

    parameters { key: "length_axis" value { string_value: "input_ids:1,attention_mask:1" } }
    parameters { key: "length_mask" value { string_value: "attention_mask" } }
    parameters { key: "length_buckets" value { string_value: "16,32,64" } }

`length_axis` names each input and output that has the axis, counted with the batch's; `length_mask` the input
that is 0 where there is padding. Requests whose lengths fall into the same bucket (powers of two, where none
are named) make up batches, padded with zeros to the longest among them. Without these, requests of different
shapes never share a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import InvalidArgumentError, ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve.pb import model_config_pb2 as pb
    from serve.request import Tensor

PARAMETERS = ("length_axis", "length_mask", "length_buckets")


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows of different lengths become equal.

    Attributes:
        axes: input and output name to the axis of its length, 1 or more.
        mask: the input that is 0 where there is padding.
        buckets: upper lengths, ascending; empty: powers of two.
    """

    axes: Mapping[str, int]
    mask: str
    buckets: tuple[int, ...] = field(default=())

    @classmethod
    def from_config(cls, message: pb.ModelConfig) -> Padding | None:
        """What a config's parameters say; None where they say nothing.

        Raises:
            ModelLoadError: a parameter is missing beside another, or can't be understood.
        """
        parameters = message.parameters
        given = {name: parameters[name].string_value for name in PARAMETERS if name in parameters}
        if not given:
            return None
        for name in ("length_axis", "length_mask"):
            if name not in given:
                raise ModelLoadError(f"config.pbtxt: parameter '{name}' is missing beside {', '.join(given)}")
        if message.max_batch_size <= 1:
            raise ModelLoadError(
                f"config.pbtxt: parameter 'length_axis' is for batches, but max_batch_size is "
                f"{message.max_batch_size}"
            )
        axes = _parse_axes(given["length_axis"])
        mask = given["length_mask"]
        if mask not in axes:
            raise ModelLoadError(
                f"config.pbtxt: parameter 'length_mask' names {mask!r}, length_axis has {list(axes)}"
            )
        return cls(axes, mask, _parse_buckets(given.get("length_buckets", "")))

    def check_names(self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]) -> None:
        """Raise ModelLoadError unless each name is a tensor's whose axis is of any size; shapes by name."""
        for name, axis in self.axes.items():
            shape = inputs.get(name, outputs.get(name))
            if shape is None or axis >= len(shape) or shape[axis] != -1:
                raise ModelLoadError(
                    f"config.pbtxt: parameter 'length_axis' says '{name}:{axis}', "
                    + ("which isn't there" if shape is None else f"whose shape is {list(shape)}")
                    + "; expected an axis of any size"
                )
        if self.mask not in inputs:
            raise ModelLoadError(f"config.pbtxt: parameter 'length_mask' is {self.mask!r}, which is no input")

    def length(self, inputs: Sequence[Tensor]) -> int:
        """The length of a request's rows.

        Raises:
            InvalidArgumentError: its inputs differ in it.
        """
        lengths: dict[str, int] = {
            t.name: t.array.shape[self.axes[t.name]] for t in inputs if t.name in self.axes
        }
        if len(set(lengths.values())) != 1:
            raise InvalidArgumentError(f"inputs differ in length: {lengths}")
        return lengths[self.mask]

    def bucket(self, length: int) -> int:
        """The smallest bucket that holds a length; beyond the last one each length is its own."""
        if not self.buckets:
            return 1 << max(0, length - 1).bit_length()
        return next((bucket for bucket in self.buckets if length <= bucket), length)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's shape without its rows, its length replaced by its bucket's."""
        shape = list(tensor.array.shape)
        axis = self.axes.get(tensor.name)
        if axis is not None:
            shape[axis] = self.bucket(shape[axis])
        return tuple(shape[1:])

    def pad(self, name: str, array: np.ndarray, length: int) -> np.ndarray:
        """An input's rows with zeros behind them up to `length`; as it is, if it has no length axis."""
        axis = self.axes.get(name)
        if axis is None or array.shape[axis] == length:
            return array
        width = [(0, 0)] * array.ndim
        width[axis] = (0, length - array.shape[axis])
        return np.pad(array, width, constant_values="" if array.dtype == object else 0)

    def cut(self, name: str, array: np.ndarray, length: int) -> np.ndarray:
        """An output's rows without what answers their padding."""
        axis = self.axes.get(name)
        if axis is None or array.shape[axis] == length:
            return array
        return array[(slice(None),) * axis + (slice(length),)]


def _parse_axes(text: str) -> dict[str, int]:
    axes = {}
    for part in text.split(","):
        name, _, axis = part.strip().rpartition(":")
        if not name or not axis.isdecimal() or not int(axis):
            raise ModelLoadError(
                f"config.pbtxt: parameter 'length_axis' has {part.strip()!r}, expected NAME:AXIS, "
                "the axis from 1 on"
            )
        axes[name] = int(axis)
    return axes


def _parse_buckets(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ModelLoadError(
            f"config.pbtxt: parameter 'length_buckets' is {text!r}, expected numbers such as 16,32,64"
        )
    return tuple(sorted(int(part) for part in parts))
