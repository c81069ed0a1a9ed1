"""Batches of training images: shuffled, moved, mirrored and partly blackened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from train.data.images import ImageData
    from train.image_classification import ImageRecipe


def augmented_batches(
    data: ImageData, rows: np.ndarray, recipe: ImageRecipe, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, ...]]:
    """One epoch of these training rows, shuffled and augmented from the generator alone.

    Yields:
        Images UINT8 [batch, h, w, c] and labels INT64 [batch]; a last, smaller batch is left out.
    """
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    order = torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]
    flip = recipe.flip and data.flip_keeps_label
    for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
        batch = order[start : start + recipe.batch_size]
        yield (
            augment(images[batch], shift=recipe.shift, flip=flip, erase=recipe.erase, generator=generator),
            labels[batch],
        )


def augment(
    images: torch.Tensor, *, shift: int, flip: bool, erase: int = 0, generator: torch.Generator
) -> torch.Tensor:
    """Move each image by up to `shift` pixels both ways, zeros coming in, mirror half, blacken a square.

    The square is "cutout": DeVries, Taylor, arXiv:1708.04552. It may reach over the border, so that some
    images keep nearly all of their pixels.

    Args:
        images: UINT8 [n, h, w, c].
        shift: largest move in pixels.
        flip: mirror left to right with probability one half.
        erase: side of the square in pixels.
        generator: the only source of randomness.

    Returns:
        UINT8 [n, h, w, c].
    """
    count, height, width, _ = images.shape
    if shift:
        padded = functional.pad(images, (0, 0, shift, shift, shift, shift))
        offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        rows = offsets[0] + torch.arange(height)
        columns = offsets[1] + torch.arange(width)
        images = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5  # noqa: PLR2004 - one half
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    if erase:
        top = torch.randint(0, height, (count, 1), generator=generator) - erase // 2
        left = torch.randint(0, width, (count, 1), generator=generator) - erase // 2
        rows, columns = torch.arange(height) - top, torch.arange(width) - left
        inside_rows, inside_columns = (rows >= 0) & (rows < erase), (columns >= 0) & (columns < erase)
        images = images.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], 0)
    return images
