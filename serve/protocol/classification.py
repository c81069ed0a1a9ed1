"""Triton's classification extension: an output as its top classes instead of its scores."""

from __future__ import annotations

import numpy as np

from serve.errors import InvalidArgumentError
from serve.protocol.datatypes import DATATYPES
from serve.request import Tensor

BYTES = DATATYPES["BYTES"]


def classify(tensor: Tensor, k: int, labels: tuple[str, ...], *, batched: bool) -> Tensor:
    """The `k` largest scores as text, "score:index" or "score:index:label", largest first.

    Args:
        tensor: scores, [batch, ...] when `batched`, else of any shape; all other axes together are classes.
        k: how many classes; cut to how many there are.
        labels: class names by index; may be shorter than the classes.
        batched: whether axis 0 is the batch.

    Returns:
        a BYTES tensor [batch, k] or [k].

    Raises:
        InvalidArgumentError: the tensor's elements can't be ordered.
    """
    if tensor.datatype.name in ("BYTES", "BF16"):
        raise InvalidArgumentError(
            f"output '{tensor.name}': classification of {tensor.datatype.name} is not possible"
        )
    batch = len(tensor.array) if batched else 1
    rows = tensor.array.reshape(batch, tensor.array.size // batch)
    top = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :k]
    texts = np.empty(top.shape, dtype=object)
    for (row, rank), index in np.ndenumerate(top):
        label = f":{labels[index]}" if index < len(labels) else ""
        score = rows[row, index]
        text = f"{score:f}" if rows.dtype.kind == "f" else str(int(score))
        texts[row, rank] = f"{text}:{index}{label}".encode()
    return Tensor(tensor.name, BYTES, texts if batched else texts[0])
