"""GPT: a decoder-only transformer that predicts the next token of a text, or classifies sentences.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018; Radford et al., "Language
Models are Unsupervised Multitask Learners", 2019. The network is in `train.transformer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.checkpoint import TOKENIZER, CheckpointError, load_checkpoint
from train.data.download import DataError
from train.data.text import hold_out, load_text_data
from train.family import Metric, Task, Trivial
from train.gpt_classification import GPTClassifier, classification_graph, classification_task
from train.gpt_serving import language_graphs, nats
from train.recipe import Recipe as BaseRecipe
from train.tokenization import TokenizerKind, encode, from_json, to_json, train_tokenizer
from train.transformer import GPT, Initialization, initialize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tokenizers import Tokenizer

    from train.checkpoint import Checkpoint
    from train.data.text import TextData
    from train.family import Scores, ServingGraph

__all__ = ["RECIPES", "Recipe", "build_model", "serving_graphs", "task"]

EVALUATION_TOKENS = 8192

TextSet = Literal["tinyshakespeare", "file"]
SentenceSet = Literal["sst2", "nsmc"]
Kind = Literal["language", "classify"]


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """How to train a GPT."""

    epochs: Annotated[int, "of a language model steps_per_epoch batches each; of a classifier all rows"] = 20
    batch_size: Annotated[int, "rows per batch; of a language model windows of context tokens"] = 32
    beta2: Annotated[float, "adamw's decay of the squared gradients"] = 0.99
    weight_decay: Annotated[float, "decoupled with adamw; never on norms and biases"] = 0.1
    label_smoothing: Annotated[float, "probability mass spread over all classes"] = 0.0
    task: Annotated[Kind, "predict the next token, or classify sentences"] = "language"
    data: Annotated[TextSet, "text to model; file is any UTF-8 text, see text_file"] = "tinyshakespeare"
    text_file: Annotated[str, "path of the text, for data file"] = ""
    sentences: Annotated[SentenceSet, "data set to classify"] = "nsmc"
    sample: Annotated[bool, "of sentences, use the small offline sample instead of downloading"] = True
    init_from: Annotated[str, "checkpoint folder to take tokenizer, network and weights from"] = ""
    tokenizer: Annotated[TokenizerKind, "a token per character, or byte pairs"] = "char"
    vocabulary: Annotated[int, "number of tokens, of bpe"] = 1024
    layers: Annotated[int, "transformer blocks"] = 4
    heads: Annotated[int, "attention heads"] = 2
    width: Annotated[int, "of the hidden states"] = 128
    context: Annotated[int, "longest input in tokens"] = 128
    dropout: Annotated[float, "of embeddings, attention weights and sublayers"] = 0.0
    channel_dropout: Annotated[float, "of embeddings and sublayers, the same along a text: cheap"] = 0.0
    bias: Annotated[bool, "linear layers and norms have biases"] = False
    initialization: Annotated[Initialization, "gpt2: deviation 0.02; or Xavier's bounds"] = "gpt2"
    steps_per_epoch: Annotated[int, "batches between two validations, of a language model"] = 250
    auxiliary: Annotated[float, "of a classifier: weight of the language model's loss beside its own"] = 0.5

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        named = bool(self.text_file) == (self.data == "file")
        self.require("text_file", named, "the path of a text with --data file, and only then")
        self.require("vocabulary", self.vocabulary >= 256, "at least 256, one per byte")  # noqa: PLR2004 - a byte's values
        for name in ("layers", "heads", "steps_per_epoch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("width", self.width > 0 and self.width % self.heads == 0, "a multiple of --heads")
        self.require("context", self.context > 1, "at least 2")
        for name in ("dropout", "channel_dropout"):
            self.require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self.require("auxiliary", self.auxiliary >= 0, "at least 0")


CPU = Recipe(
    epochs=10, optimizer="muon", learning_rate=4e-3, weight_decay=0.3, heads=4, width=256, channel_dropout=0.2
)
RECIPES = {
    # Short windows: half of the tokens per update, twice the updates in a minute.
    "quick": Recipe(epochs=5, steps_per_epoch=180, learning_rate=4e-3, warmup_fraction=0.1, context=64),
    "cpu": CPU,
    "bpe": replace(CPU, epochs=5, tokenizer="bpe"),
    "classify": Recipe(
        task="classify", epochs=4, tokenizer="bpe", vocabulary=4096, layers=2, context=64, dropout=0.1
    ),
    # nanoGPT's recipe for these characters: 1.47 on what is the test split here.
    "reference": Recipe(
        batch_size=64,
        learning_rate=1e-3,
        final_fraction=0.1,
        warmup_fraction=0.02,
        compile=True,
        layers=6,
        heads=6,
        width=384,
        context=256,
        dropout=0.2,
    ),
}


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """The untrained network for a checkpoint's model arguments, initialized from torch's global generator."""
    names = ("vocabulary", "layers", "heads", "width", "context", "dropout", "channel_dropout", "bias")
    model = GPT(**{name: arguments[name] for name in names})
    initialize(model, arguments["initialization"])
    return GPTClassifier(model, arguments["classes"]) if "classes" in arguments else model


def task(recipe: Recipe, data_dir: Path | None) -> Task:
    """A training run of this recipe, its first weights drawn from the recipe's seed or those of `init_from`.

    Raises:
        CheckpointError: `init_from` is no checkpoint of a language model.
        DataError: the data can't be read, or has too few tokens.
    """
    start = load_start(recipe.init_from) if recipe.init_from else None
    names = ("layers", "heads", "width", "context", "bias", "initialization")
    network = start.info.model if start else {name: getattr(recipe, name) for name in names}
    network = {**network, "dropout": recipe.dropout, "channel_dropout": recipe.channel_dropout}
    if recipe.task == "classify":
        return classification_task(recipe, data_dir, build_model, start, network)
    return language_task(recipe, data_dir, start, network)


def load_start(folder: str) -> Checkpoint:
    """The checkpoint of a language model, to go on from.

    Raises:
        CheckpointError: there is none, or it is a classifier's.
    """
    checkpoint = load_checkpoint(Path(folder), family="gpt")
    if "classes" in checkpoint.info.model:
        raise CheckpointError(
            f"{folder}: --init-from takes a language model, this is a classifier's checkpoint"
        )
    return checkpoint


@dataclass(frozen=True)
class Corpus:
    """A text in tokens.

    Attributes:
        data: the text itself.
        tokenizer: what made the tokens.
        fitted: ids INT64 [n] of the train split but its beginning.
        held_out: ids INT64 [k] of that beginning.
        test: ids INT64 [m].
    """

    data: TextData
    tokenizer: Tokenizer
    fitted: np.ndarray
    held_out: np.ndarray
    test: np.ndarray


def load_corpus(recipe: Recipe, data_dir: Path | None, checkpoint: Checkpoint | None, context: int) -> Corpus:
    """Load the recipe's text, in the tokens of the checkpoint or else of a tokenizer learned from the text.

    Byte pairs are learned from what is fitted. The characters are those of the whole text, as in nanoGPT:
    a model that never saw one can't be asked what it thinks of it.

    Raises:
        DataError: the text can't be read, a split is no longer than a context, or the checkpoint's tokenizer
            lacks one of its characters.
    """
    data = load_text_data(recipe.data, data_dir=data_dir, text_file=recipe.text_file)
    fitted, held_out = hold_out(data.train)
    try:
        if checkpoint is None:
            texts = (fitted, held_out, data.test) if recipe.tokenizer == "char" else (fitted,)
            tokenizer = train_tokenizer(recipe.tokenizer, texts, recipe.vocabulary)
        else:
            tokenizer = from_json(checkpoint.files[TOKENIZER])
        corpus = Corpus(data, tokenizer, *(encode(tokenizer, text) for text in (fitted, held_out, data.test)))
    except ValueError as error:
        raise DataError(f"{data.name}: {error}") from error
    shortest = min(len(corpus.fitted), len(corpus.held_out), len(corpus.test))
    if shortest <= context:
        raise DataError(
            f"{data.name}: expected more than {context} tokens in the shortest of its splits, "
            f"got {shortest}; take a longer text or lower --context"
        )
    return corpus


def language_task(
    recipe: Recipe, data_dir: Path | None, start: Checkpoint | None, network: Mapping[str, Any]
) -> Task:
    """A run that fits a language model to the recipe's text; see `task`."""
    context = network["context"]
    corpus = load_corpus(recipe, data_dir, start, context)
    vocabulary = corpus.tokenizer.get_vocab_size()
    arguments = {**network, "vocabulary": vocabulary}
    torch.manual_seed(recipe.seed)
    model = build_model(arguments)
    if start:
        model.load_state_dict(start.model.state_dict())
    ids = torch.from_numpy(corpus.fitted)

    def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        for _ in range(recipe.steps_per_epoch):
            starts = torch.randint(len(ids) - context, (recipe.batch_size, 1), generator=generator)
            yield (ids[starts + torch.arange(context + 1)],)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (window,) = batch
        logits = model(window[:, :-1]).float().flatten(0, 1)
        return functional.cross_entropy(
            logits, window[:, 1:].flatten(), label_smoothing=recipe.label_smoothing
        )

    return Task(
        model=model,
        arguments=arguments,
        dataset=corpus.data.name,
        dataset_sha256=corpus.data.sha256(),
        steps_per_epoch=recipe.steps_per_epoch,
        batches=batches,
        loss=loss,
        first_loss=math.log(vocabulary),
        metric=METRIC,
        validate=lambda model: nats_per_token(model, corpus.held_out, context),
        test=lambda model: test_scores(model, corpus, context),
        trivial=Trivial(
            "unigram",
            unigram_loss(corpus.fitted, corpus.held_out, vocabulary),
            unigram_loss(corpus.fitted, corpus.test, vocabulary),
        ),
        files={TOKENIZER: to_json(corpus.tokenizer)},
    )


@torch.no_grad()
def nats_per_token(model: nn.Module, ids: np.ndarray, context: int) -> float:
    """Mean loss of ids INT64 [n], all predicted but the first; the model is left in eval mode.

    The windows don't overlap: the first prediction of each has seen one token, the last one `context`.
    """
    device = next(model.parameters()).device
    model.eval()
    tokens = torch.from_numpy(ids).to(device)
    whole = (len(ids) - 1) // context * context
    inputs = [
        *torch.split(tokens[:whole].view(-1, context), max(1, EVALUATION_TOKENS // context)),
        tokens[None, whole:-1],
    ]
    total, done = 0.0, 0
    for window in inputs:
        targets = tokens[done + 1 : done + 1 + window.numel()]
        done += len(targets)
        if len(targets):
            logits = model(window).float().flatten(0, 1)
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
    return total / (len(ids) - 1)


def test_scores(model: nn.Module, corpus: Corpus, context: int) -> Scores:
    """Loss in nats per token, its exponential, and bits per byte of the text, which tokenizers don't change.

    The first token, which nothing predicts, costs no bits.
    """
    loss = nats_per_token(model, corpus.test, context)
    bits = loss * (len(corpus.test) - 1) / math.log(2)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits / len(corpus.data.test.encode()),
    }


def unigram_loss(fitted: np.ndarray, ids: np.ndarray, vocabulary: int) -> float:
    """Nats per token of ids INT64 [n] but the first, by how often each token is in `fitted`, plus one."""
    counts = np.bincount(fitted, minlength=vocabulary) + 1
    return float(-np.log(counts / counts.sum())[ids[1:]].mean())


METRIC = Metric("loss", higher_is_better=False, score=nats)


def serving_graphs(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
    """Of a language model those of `train.gpt_serving.language_graphs`, of a classifier one.

    Raises:
        ValueError: a field of the recipe is out of range.
        DataError: the data set can't be read.
    """
    recipe = Recipe.from_mapping(checkpoint.info.recipe)
    if not isinstance(checkpoint.model, GPT):
        return (classification_graph(recipe, checkpoint, data_dir),)
    corpus = load_corpus(recipe, data_dir, checkpoint, checkpoint.info.model["context"])
    return language_graphs(checkpoint.model, corpus.fitted, corpus.test)
