"""Whether a request fits its model, and what it may share a run with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from serve.model.model_config import ModelConfig
    from serve.request import InferRequest, Tensor


def check_request(config: ModelConfig, request: InferRequest) -> None:
    """Raise InvalidArgumentError unless each input is there once and fits, and each named output exists."""
    specs = config.inputs
    for tensor in request.inputs:
        spec = specs.get(tensor.name)
        if spec is None:
            raise InvalidArgumentError(
                f"unexpected inference input '{tensor.name}' for model '{config.name}', it has {list(specs)}"
            )
        spec.check(tensor)
    if len({tensor.name for tensor in request.inputs}) != len(specs) or len(request.inputs) != len(specs):
        raise InvalidArgumentError(
            f"model '{config.name}' expects each of the inputs {list(specs)} once, "
            f"got {[tensor.name for tensor in request.inputs]}"
        )
    for output in request.outputs:
        if output.name not in config.outputs:
            raise InvalidArgumentError(
                f"unexpected inference output '{output.name}' for model '{config.name}', "
                f"it has {list(config.outputs)}"
            )


def rows_and_shape(config: ModelConfig, inputs: Sequence[Tensor]) -> tuple[int, Hashable]:
    """A request's batch size, and what must be equal among the requests of one run.

    Args:
        config: of a model with a batch dimension.
        inputs: checked.

    Raises:
        InvalidArgumentError: the inputs differ in batch size (or length), or it is not 1 to max_batch_size.
    """
    rows = inputs[0].array.shape[0]
    if any(tensor.array.shape[0] != rows for tensor in inputs):
        sizes = {tensor.name: tensor.array.shape[0] for tensor in inputs}
        raise InvalidArgumentError(f"model '{config.name}': inputs differ in batch size: {sizes}")
    if not 1 <= rows <= config.max_batch_size:
        raise InvalidArgumentError(
            f"model '{config.name}': batch size {rows} is not in 1 to {config.max_batch_size} "
            "(max_batch_size)"
        )
    padding = config.padding
    if padding is not None:
        padding.length(inputs)
        return rows, frozenset((tensor.name, padding.shape(tensor)) for tensor in inputs)
    if len(inputs) == 1:
        return rows, inputs[0].array.shape[1:]
    return rows, frozenset((tensor.name, tensor.array.shape[1:]) for tensor in inputs)
