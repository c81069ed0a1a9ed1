"""BERT: an encoder of sentences, pre-trained on words left out, then fine-tuned to classify.

Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", NAACL 2019, arXiv:1810.04805. Trained from nothing, the normalization stands before each
sublayer (`norm` "pre") and the answer is read from the mean over the tokens (`pooling` "mean"): both train
without the long warm-up and the pre-training that the paper's choices want.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from train.bert_classification import ServedClassifier, classification_task
from train.bert_pretraining import LOSS, ServedWords, pretraining_data, pretraining_task
from train.checkpoint import TOKENIZER, load_checkpoint
from train.classification import ACCURACY
from train.data.download import DataError
from train.data.sentences import SentenceDataSet, load_sentence_data
from train.family import ServingGraph
from train.initialization import xavier_uniform
from train.recipe import Recipe as BaseRecipe
from train.sentence_classification import classification_data, example_inputs, split_data
from train.tokenization import from_json
from train.wordpiece import encode, train_wordpiece

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.checkpoint import Checkpoint
    from train.data.sentences import SentenceData
    from train.family import Task
    from train.sentence_classification import Splits

Purpose = Literal["classify", "pretrain"]
Pooling = Literal["mean", "cls"]
Norm = Literal["pre", "post"]
SHAPE = ("layers", "heads", "width", "context", "norm")
"""Fields that a pre-trained encoder and the network that takes it over must agree in."""


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """How to train a BERT; the defaults are those of a small one for sentences."""

    data: Annotated[SentenceDataSet, "data set"] = "nsmc"
    sample: Annotated[bool, "use the small offline sample instead of downloading"] = False
    train_rows: Annotated[int, "use only so many training rows; 0 is all"] = 0
    validation_fraction: Annotated[float, "part held out of training, if the data has no such split"] = 0.05
    task: Annotated[Purpose, "what to learn: classes, or left-out words and which parts match"] = "classify"
    init_from: Annotated[str, "pre-trained checkpoint folder, to take encoder and tokenizer from"] = ""
    vocabulary: Annotated[int, "largest number of WordPiece tokens; of init_from the checkpoint's"] = 8000
    layers: Annotated[int, "encoder layers"] = 2
    heads: Annotated[int, "attention heads; they share the width"] = 2
    width: Annotated[int, "numbers per token"] = 128
    context: Annotated[int, "largest number of tokens; longer texts are cut"] = 64
    norm: Annotated[Norm, "layer norm before each sublayer, or after it as in the paper"] = "pre"
    pooling: Annotated[Pooling, "classify the mean of all tokens, or [CLS] as the paper does"] = "mean"
    dropout: Annotated[float, "of embeddings, of sublayers and before the classifier"] = 0.1
    word_dropout: Annotated[float, "of classify: part of the tokens that [MASK] takes the place of"] = 0.0
    mlm_weight: Annotated[float, "of classify: of the loss for guessing the dropped words; 0 is off"] = 0.0

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        enough = self.train_rows == 0 or self.train_rows >= self.batch_size
        self.require("train_rows", enough, "0 or at least a batch")
        self.require("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        self.require("vocabulary", self.vocabulary >= 64, "at least 64")  # noqa: PLR2004 - the alphabet's quarter
        for name in ("layers", "heads"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require(
            "width", self.width > 0 and self.width % self.heads == 0, f"a multiple of {self.heads} heads"
        )
        self.require("context", self.context >= 8, "at least 8")  # noqa: PLR2004 - two parts and three marks
        for name in ("dropout", "word_dropout"):
            self.require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self.require("mlm_weight", self.mlm_weight >= 0, "at least 0")
        guessed = self.mlm_weight == 0 or self.word_dropout > 0
        self.require("mlm_weight", guessed, "0 without --word-dropout, which takes the words to guess")


QUICK = Recipe(sample=True, epochs=3, dropout=0.2, word_dropout=0.2)
NSMC = Recipe(
    epochs=2, learning_rate=1e-3, heads=4, vocabulary=12000, word_dropout=0.1, validation_fraction=0.02
)
LARGE = Recipe(
    epochs=30,
    batch_size=256,
    learning_rate=5e-4,
    beta2=0.98,
    weight_decay=0.01,
    vocabulary=16000,
    layers=6,
    heads=8,
    width=512,
    validation_fraction=0.02,
    compile=True,
)
RECIPES: Mapping[str, Recipe] = {
    "quick": QUICK,
    "cpu": NSMC,
    "nsmc": NSMC,
    # Few rows, so few weights to learn them by heart with: at width 64 one seed in two fell to 0.77.
    "sst2": Recipe(
        data="sst2",
        epochs=8,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.1,
        label_smoothing=0.0,
        ema_decay=0.995,
        vocabulary=12000,
        layers=1,
        width=32,
        dropout=0.3,
        word_dropout=0.4,
    ),
    # What quick takes over with --init-from: the same sample and shape.
    "pretrain": replace(QUICK, task="pretrain", epochs=10, dropout=0.1, word_dropout=0.0),
    # On a GPU in two commands: this one, then reference with --init-from and its folder.
    "reference_pretrain": replace(LARGE, task="pretrain"),
    "reference": replace(LARGE, epochs=5, learning_rate=1e-4, warmup_fraction=0.1, word_dropout=0.1),
}


class Bert(nn.Module):
    """Token ids to class logits FP32 [batch, classes] and hidden states FP32 [batch, time, width].

    Pre-training has two classes: the second part is of another text, or of the same one.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        width = arguments["width"]
        self.pooling = arguments["pooling"]
        self.encoder = Encoder(arguments)
        self.pooler = nn.Linear(width, width) if self.pooling == "cls" else None
        self.dropout = nn.Dropout(arguments["dropout"])
        self.classifier = nn.Linear(width, arguments["classes"])
        self.words = WordHead(self.encoder) if arguments["guesses_words"] else None

    def guess(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states FP32 [..., width] to logits of the token that was there, FP32 [..., vocabulary]."""
        assert self.words is not None
        return cast("torch.Tensor", self.words(self.encoder.last_norm(hidden)))

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class.

        Args:
            ids: token ids INT64 [batch, time].
            mask: INT64 [batch, time], 1 where there is a token, 0 where there is padding.
            types: INT64 [batch, time], 0 for the first part and 1 for the second; None is all 0.
        """
        hidden = self.encoder(ids, mask, types)
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(self.encoder.last_norm(hidden[:, 0])))
        else:
            present = mask.unsqueeze(2).to(hidden.dtype)
            pooled = self.encoder.last_norm((hidden * present).sum(1) / present.sum(1).clamp(min=1))
        return self.classifier(self.dropout(pooled)), hidden


class Encoder(nn.Module):
    """The sum of token, position and type embeddings, through the layers: FP32 [batch, time, width].

    With `norm` "pre", whoever reads the hidden states puts them through `last_norm`: the mean is taken before
    it, so that a token which says little counts little.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        width = arguments["width"]
        self.tokens = nn.Embedding(arguments["vocabulary"], width)
        self.positions = nn.Embedding(arguments["context"], width)
        self.types = nn.Embedding(2, width)
        before = arguments["norm"] == "pre"
        self.first_norm = nn.Identity() if before else nn.LayerNorm(width)
        self.dropout = nn.Dropout(arguments["dropout"])
        self.layers = nn.ModuleList(EncoderLayer(arguments) for _ in range(arguments["layers"]))
        self.last_norm = nn.LayerNorm(width) if before else nn.Identity()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """Take what `Bert.forward` takes."""
        positions = self.positions.weight[: ids.shape[1]]
        kinds = self.types.weight[0] if types is None else self.types(types)
        hidden = self.dropout(self.first_norm(self.tokens(ids) + positions + kinds))
        # Finite, so that a row of padding alone stays a number; exp of it is 0, so padding changes nothing.
        bias = (1 - mask[:, None, None, :].to(hidden.dtype)) * -1e4
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return cast("torch.Tensor", hidden)


class EncoderLayer(nn.Module):
    """Attention of all tokens to all, then a network per token, four times as wide; each beside an identity.

    Attention weights have no dropout: torch's fused attention on a CPU doesn't have it.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        width = arguments["width"]
        self.heads = arguments["heads"]
        self.before = arguments["norm"] == "pre"
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList((nn.LayerNorm(width), nn.LayerNorm(width)))
        self.dropout = nn.Dropout(arguments["dropout"])

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, time, width] to the same; bias FP32 [batch, 1, 1, time] is added to the scores."""
        first, second = self.norms
        if self.before:
            hidden = hidden + self.dropout(self.attention(first(hidden), bias))
            hidden = hidden + self.dropout(self.network(second(hidden)))
        else:
            hidden = first(hidden + self.dropout(self.attention(hidden, bias)))
            hidden = second(hidden + self.dropout(self.network(hidden)))
        return hidden

    def attention(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The mean of all tokens' values, weighted by how well their keys fit a token's query."""
        parts = self.query_key_value(hidden).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return cast("torch.Tensor", self.attended(mixed.transpose(1, 2).flatten(2)))

    def network(self, hidden: torch.Tensor) -> torch.Tensor:
        """Two linear layers with GELU between."""
        return cast("torch.Tensor", self.contract(functional.gelu(self.expand(hidden))))


class WordHead(nn.Module):
    """Hidden states FP32 [..., width] to logits FP32 [..., vocabulary], with the embedding's own weights."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        vocabulary, width = encoder.tokens.weight.shape
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight = encoder.tokens.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Take hidden states after `Encoder.last_norm`."""
        return cast("torch.Tensor", self.decoder(self.norm(functional.gelu(self.transform(hidden)))))


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """The untrained network for a checkpoint's model arguments, initialized from torch's global generator."""
    model = Bert(arguments)
    xavier_uniform(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.normal_(model.classifier.weight, std=0.02)  # so that the first answers are near chance
    if model.words is not None:
        nn.init.zeros_(model.words.decoder.bias)
    return model


def task(recipe: Recipe, data_dir: Path | None) -> Task:
    """A training run of this recipe, its first weights drawn from the recipe's seed.

    Raises:
        ValueError: the network to start from has another shape than the recipe.
        train.checkpoint.CheckpointError: it can't be read.
        train.data.download.DataError: the data set can't be read, or has fewer rows than a batch.
    """
    data = load_sentence_data(recipe.data, data_dir=data_dir, sample=recipe.sample)
    splits = _split(recipe, data)
    if (rows := len(splits.fitted.texts)) < recipe.batch_size:
        raise DataError(f"--batch-size: expected at most {rows}, the training rows, got {recipe.batch_size}")
    pretrained = load_checkpoint(Path(recipe.init_from), family="bert") if recipe.init_from else None
    if pretrained is None:
        tokenizer = train_wordpiece(splits.fitted.texts, recipe.vocabulary)
    else:
        tokenizer = from_json(pretrained.files[TOKENIZER])
    arguments = {
        "classes": len(data.labels) if recipe.task == "classify" else 2,
        "vocabulary": tokenizer.get_vocab_size(),
        **{name: getattr(recipe, name) for name in (*SHAPE, "pooling", "dropout")},
        "guesses_words": recipe.task == "pretrain" or recipe.mlm_weight > 0,
    }
    torch.manual_seed(recipe.seed)
    model = cast("Bert", build_model(arguments))
    if pretrained is not None:
        take_over(model, recipe, pretrained)
    run = classification_task if recipe.task == "classify" else pretraining_task
    return run(recipe, data=data, splits=splits, tokenizer=tokenizer, model=model, arguments=arguments)


def take_over(model: Bert, recipe: Recipe, pretrained: Checkpoint) -> None:
    """Copy the pre-trained encoder, and the head that guesses words where both networks have one.

    Raises:
        ValueError: a field of the recipe that shapes the encoder differs from the checkpoint's.
    """
    for name in SHAPE:
        expected = pretrained.info.model[name]
        recipe.require(name, getattr(recipe, name) == expected, f"{expected} as in {recipe.init_from}")
    source = cast("Bert", pretrained.model)
    model.encoder.load_state_dict(source.encoder.state_dict())
    if model.words is not None and source.words is not None:
        model.words.load_state_dict(source.words.state_dict())


def serving_graphs(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
    """The one graph: token ids and mask INT64 [batch, time] to logits, of classes or of left-out words.

    Raises:
        ValueError: a field of the checkpoint's recipe is out of range.
        train.data.download.DataError: the data set can't be read.
    """
    recipe = Recipe.from_mapping(checkpoint.info.recipe)
    data = load_sentence_data(recipe.data, data_dir=data_dir, sample=recipe.sample)
    splits, vocabulary = _split(recipe, data), checkpoint.info.model["vocabulary"]
    tokens = partial(encode, from_json(checkpoint.files[TOKENIZER]), context=recipe.context)
    model = cast("Bert", checkpoint.model)
    if recipe.task == "classify":
        module: nn.Module = ServedClassifier(model)
        rows, metric = classification_data(splits, data.labels, tokens, recipe.context), ACCURACY
    else:
        module = ServedWords(model)
        rows, metric = pretraining_data(splits, vocabulary, tokens, recipe.context), LOSS
    example = example_inputs(vocabulary, recipe.context)
    return (ServingGraph(suffix="", module=module.eval(), example=example, data=rows, metric=metric),)


def _split(recipe: Recipe, data: SentenceData) -> Splits:
    return split_data(data, validation_fraction=recipe.validation_fraction, train_rows=recipe.train_rows)
