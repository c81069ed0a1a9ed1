"""What every sentence classifier shares: splits, padding, batches of like length, metric, serving inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from train.classification import OUTPUT
from train.family import ExampleInputs, ServingData

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from train.data.sentences import SentenceData

IDS, MASK = "input_ids", "attention_mask"
CALIBRATION_ROWS = 512
HELD_OUT_ROWS = 4000
EVALUATION_BATCH = 250
SORTED_BATCHES = 50


class Texts(NamedTuple):
    """Rows of one split: n texts, and their classes INT64 [n]."""

    texts: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Splits:
    """A data set's rows by what a run does with them: fit, choose the best epoch, test."""

    fitted: Texts
    validation: Texts
    test: Texts


def split_data(data: SentenceData, *, validation_fraction: float, train_rows: int) -> Splits:
    """Hold rows out of training, unless the data set has a validation split of its own.

    The split doesn't depend on the run's seed: runs stay comparable, and an exporter finds the same rows.

    Args:
        data: the data set.
        validation_fraction: part of the training rows to hold out.
        train_rows: fit only so many of the rest; 0 is all.
    """
    order = np.random.default_rng(0).permutation(len(data.train_texts))
    held_out = 0 if data.validation_texts else max(1, round(len(order) * validation_fraction))

    def rows(indices: np.ndarray) -> Texts:
        return Texts(tuple(data.train_texts[index] for index in indices), data.train_labels[indices])

    own = Texts(data.validation_texts, data.validation_labels)
    return Splits(
        fitted=rows(order[held_out:][: train_rows or None]),
        validation=rows(order[:held_out]) if held_out else own,
        test=Texts(data.test_texts, data.test_labels),
    )


def pad(rows: Sequence[np.ndarray], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill token ids with zeros to a common length.

    Args:
        rows: n of INT64 [tokens].
        length: of all rows; None takes the longest one's.

    Returns:
        Token ids and mask, both INT64 [n, length]; the mask is 1 where there is a token.
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) if length is None else length
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    ids[mask] = torch.from_numpy(np.concatenate(rows))
    return ids, mask.to(torch.int64)


def length_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """One epoch of batches of rows of like length, in random order: INT64 [batch_size] row indices.

    Rows are shuffled, then sorted within every 50 batches. Padded to its own longest row, a batch of film
    reviews is half as long as one of rows as they come. The last, smaller batch is dropped.
    """
    steps = len(lengths) // batch_size
    order = torch.randperm(len(lengths), generator=generator)[: steps * batch_size]
    sizes = torch.as_tensor(lengths)[order]
    batches: list[torch.Tensor] = []
    for start in range(0, len(order), SORTED_BATCHES * batch_size):
        window = slice(start, start + SORTED_BATCHES * batch_size)
        batches.extend(order[window][sizes[window].argsort(stable=True)].view(-1, batch_size))
    for index in torch.randperm(steps, generator=generator):
        yield batches[index]


def accuracy(
    model: nn.Module,
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    classify: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    """Share of rows whose largest logit is their class's, in evaluation mode, on the model's device.

    Args:
        model: the network.
        rows: n of token ids INT64 [tokens].
        labels: INT64 [n].
        classify: of the model, token ids and mask INT64 [batch, time]: logits [batch, classes].
    """
    model.eval()
    device = next(model.parameters()).device
    order = np.argsort([len(row) for row in rows], kind="stable")
    right = 0
    with torch.no_grad():
        for start in range(0, len(order), EVALUATION_BATCH):
            chosen = order[start : start + EVALUATION_BATCH]
            ids, mask = pad([rows[index] for index in chosen])
            logits = classify(model, ids.to(device), mask.to(device))
            right += int((logits.argmax(1).cpu() == torch.from_numpy(labels[chosen])).sum())
    return right / len(rows)


def example_inputs(vocabulary: int, context: int) -> ExampleInputs:
    """Two rows of random tokens, the second one shorter; INT64 [2, at most 8]."""
    time = min(8, context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, time), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, time // 2 :] = 0
    axes = {0: "batch", 1: "time"}
    return ExampleInputs({IDS: ids * mask, MASK: mask}, {IDS: axes, MASK: axes}, (OUTPUT,))


def classification_data(
    splits: Splits,
    labels: tuple[str, ...],
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    context: int | None = None,
) -> ServingData:
    """Up to 512 fitted rows to calibrate and 4 000 of the test split, as a client sends them.

    Args:
        splits: the rows of the checkpoint's data set.
        labels: class names in index order.
        encode: texts to token ids, INT64 [tokens] each.
        context: largest number of tokens that the network takes; None is the longest row's.

    Returns:
        "input_ids" and "attention_mask", INT64 [n, time] and [m, time]; time is the longest row's of both, so
        that one batch takes all; targets INT64 [m]; `other_lengths` as other shapes.
    """
    calibration = encode(splits.fitted.texts[:CALIBRATION_ROWS])
    held_out = encode(splits.test.texts[:HELD_OUT_ROWS])
    longest = max(len(row) for row in (*calibration, *held_out))
    return ServingData(
        calibration=padded_inputs(calibration, longest),
        held_out=padded_inputs(held_out, longest),
        targets=splits.test.labels[:HELD_OUT_ROWS],
        labels=labels,
        other_shapes=other_lengths(held_out, longest, context or longest),
    )


def other_lengths(rows: Sequence[np.ndarray], taken: int, context: int) -> tuple[dict[str, np.ndarray], ...]:
    """Inputs of one, two and as many tokens as the network takes, with and without padding.

    Args:
        rows: token ids INT64 [tokens] each; joined and cut anew, so that the longest inputs have no padding.
        taken: the length to leave out.
        context: the largest.

    Returns:
        For each length "input_ids" and "attention_mask", INT64 [4, length]; half the rows are padded by half.
    """
    tokens = np.concatenate(rows)
    lengths = [length for length in (1, 2, context) if length not in {taken, 0}]
    return tuple(
        padded_inputs([np.resize(np.roll(tokens, -row), part) for row, part in enumerate(parts)], parts[0])
        for parts in ((length, length, max(1, length // 2), max(1, length // 2)) for length in lengths)
    )


def padded_inputs(rows: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Rows of token ids as the inputs of a serving graph, INT64 [n, length] each."""
    ids, mask = pad(rows, length)
    return {IDS: ids.numpy(), MASK: mask.numpy()}
