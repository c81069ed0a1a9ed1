"""BERT's pre-training: guess words that were left out, and whether two parts are of one text.

Devlin et al., arXiv:1810.04805, section 3.1. The paper takes consecutive sentences of long documents. A film
review is no document: here a pair is a text's beginning, and what follows in it or the end of another text.
Texts are cut anywhere, not in the middle: two halves of like length would tell that they are of one text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.checkpoint import TOKENIZER
from train.classification import OUTPUT
from train.data.download import DataError
from train.family import Metric, ServingData, Task, Trivial
from train.sentence_classification import (
    CALIBRATION_ROWS,
    EVALUATION_BATCH,
    IDS,
    length_batches,
    other_lengths,
    pad,
    padded_inputs,
)
from train.tokenization import to_json
from train.wordpiece import CLS, MASK, SEP, SPECIAL_TOKENS, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tokenizers import Tokenizer

    from train.bert import Bert, Recipe
    from train.data.sentences import SentenceData
    from train.sentence_classification import Splits

MASKED_SHARE = 0.15
TO_MASK, TO_RANDOM = 0.8, 0.1
IGNORED = -100
HELD_OUT_ROWS = 128  # each has logits of the whole vocabulary per token: these take a quarter of a gigabyte


class PairBatch(NamedTuple):
    """Pairs to learn from, INT64 [batch, time] but for `next`.

    Attributes:
        ids: [CLS], the beginning, [SEP], the end, [SEP]; some tokens replaced.
        mask: 1 where there is a token.
        types: 0 up to the first [SEP], 1 after it.
        targets: the token that was at a place to guess, `IGNORED` elsewhere.
        next: [batch], 1 where both parts are of one text.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor
    targets: torch.Tensor
    next: torch.Tensor


@dataclass(frozen=True)
class Corpus:
    """Texts to make pairs of.

    Attributes:
        rows: of each text the tokens without [CLS] and [SEP], INT64 [at least 2].
        vocabulary: number of tokens.
        context: of the pair with its three marks.
    """

    rows: Sequence[np.ndarray]
    vocabulary: int
    context: int

    @classmethod
    def of(cls, encoded: Sequence[np.ndarray], vocabulary: int, context: int) -> Corpus:
        """Of token ids between [CLS] and [SEP]; a text of less than two can't be cut and is left out.

        Raises:
            DataError: fewer than two texts are left, too few for a pair of two texts.
        """
        rows = [row[1:-1] for row in encoded if len(row) >= 4]  # noqa: PLR2004 - two tokens and two marks
        if len(rows) < 2:  # noqa: PLR2004 - a pair
            raise DataError(f"expected two texts or more of two tokens or more to pair, got {len(rows)}")
        return cls(rows, vocabulary, context)

    def batch(self, chosen: torch.Tensor, generator: torch.Generator) -> PairBatch:
        """One pair for the beginning of each chosen text, INT64 [n]; about half end as their text does."""
        is_next = torch.rand(len(chosen), generator=generator) < 0.5  # noqa: PLR2004 - one half
        steps = torch.randint(1, len(self.rows), chosen.shape, generator=generator)
        ends = torch.where(is_next, chosen, (chosen + steps) % len(self.rows))
        places, other_places = torch.rand(2, len(chosen), generator=generator)
        beginnings = self.cut(chosen, places)
        rests = self.cut(ends, torch.where(is_next, places, other_places))
        pairs = [
            joined(beginning, rest, self.context)
            for (beginning, _), (_, rest) in zip(beginnings, rests, strict=True)
        ]
        ids, mask = pad([row for row, _ in pairs])
        firsts = torch.tensor([first for _, first in pairs])
        types = (torch.arange(ids.shape[1]) >= firsts[:, None]).to(torch.int64) * mask
        masked, targets = replace_tokens(ids, self.vocabulary, generator)
        return PairBatch(masked, mask, types, targets, is_next.to(torch.int64))

    def cut(self, chosen: torch.Tensor, places: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        """Both parts of each chosen text INT64 [n], cut at these places FP32 [n]; see `part`."""
        rows = (self.rows[index] for index in chosen.tolist())
        return [part(row, place) for row, place in zip(rows, places.tolist(), strict=True)]

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[PairBatch]:
        """One epoch of training batches."""
        for chosen in length_batches([len(row) for row in self.rows], batch_size, generator):
            yield self.batch(chosen, generator)

    def fixed_batches(self) -> Iterator[PairBatch]:
        """All texts in order; the same pairs and the same places to guess each time."""
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(self.rows), EVALUATION_BATCH):
            yield self.batch(torch.arange(start, min(start + EVALUATION_BATCH, len(self.rows))), generator)


def part(row: np.ndarray, where: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut a row of tokens in two, neither empty; `where` from 0 to below 1 is the place of the cut."""
    cut = 1 + int(where * (len(row) - 1))
    return row[:cut], row[cut:]


def joined(beginning: np.ndarray, end: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """[CLS], `beginning`, [SEP], `end`, [SEP]; each part shortened to half the room in `context`.

    Returns:
        Token ids INT64 [at most context], and the index where the second part starts.
    """
    room = (context - 3) // 2
    first, second = beginning[:room], end[:room]
    return np.concatenate(([CLS], first, [SEP], second, [SEP])), len(first) + 2


def replace_tokens(
    ids: torch.Tensor, vocabulary: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose 15 % of the tokens to guess; 80 % of those become [MASK], 10 % any token, 10 % stay.

    What stays or is wrong keeps the network from trusting that a word it sees is right: fine-tuning has no
    [MASK].

    Args:
        ids: INT64 [batch, time]; special tokens and padding are never chosen.
        vocabulary: number of tokens.
        generator: the only source of randomness.

    Returns:
        The replaced ids, and the targets: the original where one is to guess, `IGNORED` elsewhere.
    """
    draws = torch.rand(ids.shape, generator=generator)
    chosen = (draws < MASKED_SHARE) & (ids >= len(SPECIAL_TOKENS))
    fate = torch.rand(ids.shape, generator=generator)
    anything = torch.randint(len(SPECIAL_TOKENS), vocabulary, ids.shape, generator=generator)
    replaced = torch.where(chosen & (fate < TO_MASK), MASK, ids)
    replaced = torch.where(chosen & (fate >= TO_MASK) & (fate < TO_MASK + TO_RANDOM), anything, replaced)
    return replaced, torch.where(chosen, ids, IGNORED)


def word_loss(model: Bert, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the tokens to guess; 0 where there are none."""
    chosen = targets != IGNORED
    logits = model.guess(hidden[chosen]).float()
    total = functional.cross_entropy(logits, targets[chosen], reduction="sum")
    return total / chosen.sum().clamp(min=1)


def pretraining_task(
    recipe: Recipe,
    *,
    data: SentenceData,
    splits: Splits,
    tokenizer: Tokenizer,
    model: Bert,
    arguments: Mapping[str, Any],
) -> Task:
    """A run that teaches `model` to guess words and to tell whether two parts are of one text."""
    vocabulary = arguments["vocabulary"]
    fitted, validation, test = (
        Corpus.of(encode(tokenizer, split.texts, recipe.context), vocabulary, recipe.context)
        for split in (splits.fitted, splits.validation, splits.test)
    )
    return Task(
        model=model,
        arguments=arguments,
        dataset=data.name,
        dataset_sha256=data.sha256(),
        steps_per_epoch=len(fitted.rows) // recipe.batch_size,
        batches=lambda generator: fitted.batches(recipe.batch_size, generator),
        loss=pair_loss,
        first_loss=math.log(vocabulary) + math.log(2),
        metric=LOSS,
        validate=lambda model: evaluate(model, validation)[LOSS.name],
        test=lambda model: evaluate(model, test),
        trivial=unigram(fitted, validation, test),
        files={TOKENIZER: to_json(tokenizer)},
    )


def pair_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The paper's loss: of the tokens to guess plus of whether both parts are of one text."""
    ids, mask, types, targets, is_next = batch
    logits, hidden = model(ids, mask, types)
    return word_loss(cast("Bert", model), hidden, targets) + functional.cross_entropy(logits.float(), is_next)


def evaluate(model: nn.Module, corpus: Corpus) -> dict[str, float]:
    """Figures of the network in evaluation mode, on its device.

    Returns:
        "loss", the cross-entropy per token to guess in nats; "mlm_accuracy", the share of them guessed right;
        "nsp_accuracy", the share of pairs told right.
    """
    model.eval()
    device = next(model.parameters()).device
    guess = cast("Bert", model).guess
    loss, right, guessed, told = 0.0, 0, 0, 0
    with torch.no_grad():
        for batch in corpus.fixed_batches():
            ids, mask, types, targets, is_next = (tensor.to(device) for tensor in batch)
            answer, hidden = model(ids, mask, types)
            chosen = targets != IGNORED
            logits = guess(hidden[chosen])
            loss += float(functional.cross_entropy(logits, targets[chosen], reduction="sum"))
            right += int((logits.argmax(1) == targets[chosen]).sum())
            guessed += int(chosen.sum())
            told += int((answer.argmax(1) == is_next).sum())
    return {
        "loss": loss / guessed,
        "mlm_accuracy": right / guessed,
        "nsp_accuracy": told / len(corpus.rows),
    }


def unigram(fitted: Corpus, validation: Corpus, test: Corpus) -> Trivial:
    """The loss of always answering with the tokens' frequencies in the fitted rows, one added to each."""
    counts = np.bincount(np.concatenate(fitted.rows), minlength=fitted.vocabulary) + 1
    surprise = torch.from_numpy(-np.log(counts / counts.sum()))

    def loss(corpus: Corpus) -> float:
        targets = torch.cat([batch.targets[batch.targets != IGNORED] for batch in corpus.fixed_batches()])
        return float(surprise[targets].mean())

    return Trivial("unigram", validation=loss(validation), test=loss(test))


class ServedWords(nn.Module):
    """INT64 token ids and mask [batch, time] to token logits FP32 [batch, time, vocabulary]."""

    def __init__(self, model: Bert) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.model.guess(self.model.encoder(input_ids, attention_mask, None))


def masked_loss(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
    """Cross-entropy in nats of logits [n, time, vocabulary] where targets [n, time] are not `IGNORED`."""
    chosen = targets != IGNORED
    logits = torch.from_numpy(outputs[OUTPUT][chosen]).float()
    return float(functional.cross_entropy(logits, torch.from_numpy(targets[chosen])))


LOSS = Metric("loss", higher_is_better=False, score=masked_loss, relative=True)


def pretraining_data(
    splits: Splits, vocabulary: int, encode: Callable[[Sequence[str]], list[np.ndarray]], context: int
) -> ServingData:
    """Up to 512 fitted rows to calibrate and 128 of the test split, single texts with words left out.

    Returns:
        "input_ids" and "attention_mask", INT64 [n, time] and [m, time]; targets INT64 [m, time]; other
        shapes of one, two and `context` tokens.
    """
    calibration = encode(splits.fitted.texts[:CALIBRATION_ROWS])
    held_out = encode(splits.test.texts[:HELD_OUT_ROWS])
    longest = max(len(row) for row in (*calibration, *held_out))
    ids, _ = pad(held_out, longest)
    replaced, targets = replace_tokens(ids, vocabulary, torch.Generator().manual_seed(0))
    inputs = padded_inputs(held_out, longest)
    return ServingData(
        calibration=padded_inputs(calibration, longest),
        held_out={**inputs, IDS: replaced.numpy()},
        targets=targets.numpy(),
        other_shapes=other_lengths(held_out, longest, context),
    )
