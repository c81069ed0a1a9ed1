"""A GPT fine-tuned to classify sentences: Radford et al. 2018, sections 3.2 and 3.3.

A linear layer reads the last token's hidden state, the only one that has seen the whole sentence. The
language model's loss goes on beside the classifier's, which keeps what was learned before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.checkpoint import TOKENIZER
from train.classification import ACCURACY, majority_class
from train.data.download import DataError
from train.data.sentences import load_sentence_data
from train.family import ServingGraph, Task
from train.sentence_classification import (
    accuracy,
    classification_data,
    example_inputs,
    length_batches,
    pad,
    split_data,
)
from train.tokenization import encode, from_json, to_json, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from train.checkpoint import Checkpoint
    from train.data.sentences import SentenceData
    from train.gpt import Recipe
    from train.transformer import GPT

VALIDATION_FRACTION = 0.1
IGNORED = -100


class GPTClassifier(nn.Module):
    """Token ids and mask INT64 [batch, time], padded on the right, to logits FP32 [batch, classes]."""

    def __init__(self, gpt: GPT, classes: int) -> None:
        super().__init__()
        self.gpt = gpt
        self.head = nn.Linear(gpt.tokens.embedding_dim, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def classify(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits FP32 [batch, classes] of hidden states [batch, time, width] at each row's last token."""
        last = mask.sum(dim=1).clamp(min=1) - 1
        rows = torch.arange(len(hidden), device=hidden.device)
        logits: torch.Tensor = self.head(hidden[rows, last])
        return logits

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits FP32 [batch, classes]. Padding needs no masking: a token sees none of those after it."""
        return self.classify(self.gpt.hidden(ids), mask)


def classification_task(
    recipe: Recipe,
    data_dir: Path | None,
    build_model: Callable[[Mapping[str, Any]], nn.Module],
    start: Checkpoint | None,
    network: Mapping[str, Any],
) -> Task:
    """A run that fits a classifier to the recipe's sentences.

    Args:
        recipe: of the family.
        data_dir: the data set's files; None takes the recipe's.
        build_model: of the family.
        start: language model whose tokenizer and weights the run begins with; None begins from scratch.
        network: model arguments but for the classes, and the vocabulary where there is no `start`.

    Raises:
        DataError: the data can't be read, has fewer rows than a batch, or characters that `start` lacks.
    """
    data = load_sentence_data(recipe.sentences, data_dir=data_dir, sample=recipe.sample)
    splits = split_data(data, validation_fraction=VALIDATION_FRACTION, train_rows=0)
    tokenizer = from_json(start.files[TOKENIZER]) if start else own_tokenizer(recipe, data)
    arguments = {**network, "vocabulary": tokenizer.get_vocab_size(), "classes": len(data.labels)}
    fitted, validation, test = (
        encode_rows(split.texts, tokenizer, arguments["context"])
        for split in (splits.fitted, splits.validation, splits.test)
    )
    torch.manual_seed(recipe.seed)
    model = build_model(arguments)
    if start:
        cast("GPTClassifier", model).gpt.load_state_dict(start.model.state_dict())
    steps = len(fitted) // recipe.batch_size
    if steps == 0:
        raise DataError(
            f"--batch-size: expected at most {len(fitted)}, the training rows, got {recipe.batch_size}"
        )
    lengths = [len(row) for row in fitted]

    def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        for rows in length_batches(lengths, recipe.batch_size, generator):
            yield (*pad([fitted[row] for row in rows]), torch.from_numpy(splits.fitted.labels[rows]))

    return Task(
        model=model,
        arguments=arguments,
        dataset=data.name,
        dataset_sha256=data.sha256(),
        steps_per_epoch=steps,
        batches=batches,
        loss=lambda model, batch: classifier_loss(model, batch, recipe),
        first_loss=math.log(len(data.labels)) + recipe.auxiliary * math.log(tokenizer.get_vocab_size()),
        metric=ACCURACY,
        validate=lambda model: accuracy(model, validation, splits.validation.labels, nn.Module.__call__),
        test=lambda model: {"accuracy": accuracy(model, test, splits.test.labels, nn.Module.__call__)},
        trivial=majority_class(
            splits.fitted.labels, validation=splits.validation.labels, test=splits.test.labels
        ),
        files={TOKENIZER: to_json(tokenizer)},
    )


def own_tokenizer(recipe: Recipe, data: SentenceData) -> Tokenizer:
    """Byte pairs of the train split, or the characters of all splits, as for a text: see `train.gpt`."""
    texts = data.train_texts
    if recipe.tokenizer == "char":
        texts = (*texts, *data.validation_texts, *data.test_texts)
    return train_tokenizer(recipe.tokenizer, texts, recipe.vocabulary)


def encode_rows(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[np.ndarray]:
    """INT64 [tokens] per text, at most `context` from its beginning; token 0 stands for an empty text.

    Raises:
        DataError: the tokenizer lacks a character.
    """
    try:
        rows = [encode(tokenizer, text)[:context] for text in texts]
    except ValueError as error:
        raise DataError(f"sentences: {error}") from error
    return [row if len(row) else np.zeros(1, np.int64) for row in rows]


def classifier_loss(model: nn.Module, batch: tuple[torch.Tensor, ...], recipe: Recipe) -> torch.Tensor:
    """The classes' cross-entropy plus `auxiliary` times the language model's, of all tokens but padding."""
    ids, mask, labels = batch
    classifier = cast("GPTClassifier", model)  # or torch.compile's wrapper of one
    hidden = classifier.gpt.hidden(ids)
    logits = classifier.classify(hidden, mask).float()
    loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if not recipe.auxiliary or ids.shape[1] == 1:
        return loss
    following = classifier.gpt.logits(hidden[:, :-1]).float().flatten(0, 1)
    targets = torch.where(mask[:, 1:] == 1, ids[:, 1:], IGNORED).flatten()
    count = mask[:, 1:].sum().clamp(min=1)  # none where all rows have one token
    language = functional.cross_entropy(following, targets, ignore_index=IGNORED, reduction="sum") / count
    return loss + recipe.auxiliary * language


def classification_graph(recipe: Recipe, checkpoint: Checkpoint, data_dir: Path | None) -> ServingGraph:
    """Token ids and mask INT64 [batch, time] to logits FP32 [batch, classes].

    Raises:
        DataError: the data set can't be read.
    """
    data = load_sentence_data(recipe.sentences, data_dir=data_dir, sample=recipe.sample)
    splits = split_data(data, validation_fraction=VALIDATION_FRACTION, train_rows=0)
    tokenizer = from_json(checkpoint.files[TOKENIZER])
    vocabulary, context = checkpoint.info.model["vocabulary"], checkpoint.info.model["context"]
    return ServingGraph(
        suffix="",
        module=checkpoint.model,
        example=example_inputs(vocabulary, context),
        data=classification_data(splits, data.labels, lambda texts: encode_rows(texts, tokenizer, context)),
        metric=ACCURACY,
    )
