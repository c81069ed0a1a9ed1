"""Makes tokens that a text already has less likely (or likelier), at a cost that doesn't grow with it."""

from __future__ import annotations

import numpy as np

_LARGEST = np.finfo(np.float32).max


class Penalties:
    """The penalties of one sequence; the tokens are counted as they come.

    Attributes:
        repetition: for tokens of the prompt and of the text.
        presence: for tokens of the text.
        frequency: for each time that a token is in the text.
    """

    def __init__(self, repetition: float, presence: float, frequency: float) -> None:
        self.repetition = np.float32(repetition)
        self.presence = np.float32(presence)
        self.frequency = np.float32(frequency)
        self._read = 0
        self._seen = np.zeros(0, np.bool_)  # [vocabulary] once it is known
        self._times = np.zeros(0, np.float32)  # as above
        self._repeated = np.zeros(0, np.int64)  # where `_seen` is true

    def apply(self, logits: np.ndarray, ids: list[int], prompt_length: int) -> None:
        """Change logits FP32 [vocabulary] in place; see `Sampler.next` for the arguments."""
        self._read_on(logits.size, ids, prompt_length)
        if self.repetition != 1:
            values = logits[self._repeated]
            with np.errstate(over="ignore"):
                values = np.where(values > 0, values / self.repetition, values * self.repetition)
            logits[self._repeated] = np.clip(values, -_LARGEST, _LARGEST)
        if self.frequency:
            logits -= self.frequency * self._times
        if self.presence:
            logits -= self.presence * (self._times > 0)

    def _read_on(self, vocabulary: int, ids: list[int], prompt_length: int) -> None:
        """Count the tokens that came since the last time: one, after the first."""
        if not self._read:
            self._seen = np.zeros(vocabulary, np.bool_)
            self._times = np.zeros(vocabulary, np.float32)
        new = np.asarray(ids[self._read :], np.int64)
        generated = new[max(0, prompt_length - self._read) :]
        self._read = len(ids)
        np.add.at(self._times, generated, 1)
        if self.repetition != 1 and not self._seen[new].all():
            self._seen[new] = True
            self._repeated = np.flatnonzero(self._seen)
