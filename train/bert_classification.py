"""Classify sentences with a BERT: words left out against overfitting, and guessed where a recipe wants it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from train.bert_pretraining import IGNORED, word_loss
from train.checkpoint import TOKENIZER
from train.classification import ACCURACY, majority_class
from train.family import Task
from train.sentence_classification import accuracy, length_batches, pad
from train.tokenization import to_json
from train.wordpiece import MASK, SPECIAL_TOKENS, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from tokenizers import Tokenizer

    from train.bert import Bert, Recipe
    from train.data.sentences import SentenceData
    from train.sentence_classification import Splits, Texts


def classification_task(
    recipe: Recipe,
    *,
    data: SentenceData,
    splits: Splits,
    tokenizer: Tokenizer,
    model: Bert,
    arguments: Mapping[str, Any],
) -> Task:
    """A run that fits `model` to the texts' classes."""
    fitted, validation, test = (
        encode(tokenizer, split.texts, recipe.context)
        for split in (splits.fitted, splits.validation, splits.test)
    )
    labels = torch.from_numpy(splits.fitted.labels)

    def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        for chosen in length_batches([len(row) for row in fitted], recipe.batch_size, generator):
            ids, mask = pad([fitted[index] for index in chosen])
            yield (*drop_words(ids, recipe.word_dropout, generator), mask, labels[chosen])

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ids, targets, mask, label = batch
        logits, hidden = model(ids, mask)
        total = functional.cross_entropy(logits.float(), label, label_smoothing=recipe.label_smoothing)
        if recipe.mlm_weight:
            total = total + recipe.mlm_weight * word_loss(cast("Bert", model), hidden, targets)
        return total

    def judge(model: nn.Module, rows: list[np.ndarray], split: Texts) -> float:
        return accuracy(model, rows, split.labels, lambda network, ids, mask: network(ids, mask)[0])

    return Task(
        model=model,
        arguments=arguments,
        dataset=data.name,
        dataset_sha256=data.sha256(),
        steps_per_epoch=len(fitted) // recipe.batch_size,
        batches=batches,
        loss=loss,
        first_loss=math.log(arguments["classes"]) + recipe.mlm_weight * math.log(arguments["vocabulary"]),
        metric=ACCURACY,
        validate=lambda model: judge(model, validation, splits.validation),
        test=lambda model: {ACCURACY.name: judge(model, test, splits.test)},
        trivial=majority_class(
            splits.fitted.labels, validation=splits.validation.labels, test=splits.test.labels
        ),
        files={TOKENIZER: to_json(tokenizer)},
    )


def drop_words(
    ids: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put [MASK] in the place of this share of the tokens INT64 [batch, time], special ones excepted.

    Returns:
        The ids so changed, and the tokens that were replaced, `IGNORED` elsewhere.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < share) & (ids >= len(SPECIAL_TOKENS))
    return torch.where(chosen, MASK, ids), torch.where(chosen, ids, IGNORED)


class ServedClassifier(nn.Module):
    """INT64 token ids and mask [batch, time] to class logits FP32 [batch, classes]."""

    def __init__(self, model: Bert) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits: torch.Tensor = self.model(input_ids, attention_mask)[0]
        return logits
