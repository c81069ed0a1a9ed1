"""What classifiers of images and of sentences share: the metric, and the answer that needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from train.family import Metric, Trivial

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTPUT = "logits"


def share_of_right_classes(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
    """Accuracy of logits [n, classes] against class indices [n]."""
    return float((outputs[OUTPUT].argmax(axis=1) == targets).mean())


ACCURACY = Metric("accuracy", higher_is_better=True, score=share_of_right_classes)


def majority_class(fitted: np.ndarray, *, validation: np.ndarray, test: np.ndarray) -> Trivial:
    """Accuracy of always answering the class that is most frequent among the fitted rows.

    Args:
        fitted: class indices INT64 [n].
        validation: those of the validation rows, [m].
        test: those of the test split, [k].
    """
    most = np.bincount(fitted).argmax()
    return Trivial("majority class", float((validation == most).mean()), float((test == most).mean()))
