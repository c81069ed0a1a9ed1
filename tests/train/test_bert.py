import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from train import bert
from train.bert import Bert
from train.bert_classification import drop_words
from train.bert_pretraining import (
    IGNORED,
    Corpus,
    evaluate,
    joined,
    masked_loss,
    part,
    replace_tokens,
    word_loss,
)
from train.checkpoint import TOKENIZER, load_checkpoint
from train.data.download import DataError
from train.family import ServingGraph, Task
from train.loop import Trainer
from train.wordpiece import CLS, MASK, SEP, SPECIAL_TOKENS

ARGUMENTS = {
    "classes": 2,
    "vocabulary": 50,
    "layers": 2,
    "heads": 2,
    "width": 16,
    "context": 12,
    "norm": "pre",
    "pooling": "mean",
    "dropout": 0.0,
    "guesses_words": True,
}
SMALL = bert.Recipe(
    sample=True,
    train_rows=256,
    validation_fraction=0.02,
    epochs=1,
    batch_size=16,
    learning_rate=3e-3,
    vocabulary=800,
    layers=1,
    heads=2,
    width=32,
    context=24,
    precision="float32",
)
PRETRAINING = dataclasses.replace(SMALL, task="pretrain")


def network(**changes: object) -> Bert:
    """Weights and norms drawn at random, so that no part of the answer is zero by chance."""
    torch.manual_seed(0)
    model = cast("Bert", bert.build_model({**ARGUMENTS, **changes}))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model.eval()


def fitted(task: Task, recipe: bert.Recipe, out: Path) -> dict[str, float]:
    return Trainer(task, recipe, out, family="bert", device=torch.device("cpu")).fit()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    fitted(bert.task(PRETRAINING, None), PRETRAINING, folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    recipe = dataclasses.replace(SMALL, train_rows=4000, batch_size=32)
    fitted(bert.task(recipe, None), recipe, folder)
    return folder


def test_the_papers_network_has_the_papers_size() -> None:
    # BERT-base: the paper says 110 M, its layers add up to this, the heads of pre-training left out.
    with torch.device("meta"):
        model = Bert(
            {
                "classes": 2,
                "vocabulary": 30522,
                "layers": 12,
                "heads": 12,
                "width": 768,
                "context": 512,
                "norm": "post",
                "pooling": "cls",
                "dropout": 0.1,
                "guesses_words": False,
            }
        )
    assert sum(weight.numel() for weight in model.parameters()) == 109_482_240 + 2 * 768 + 2


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_no_answer(norm: str, pooling: str) -> None:
    model = network(norm=norm, pooling=pooling)
    ids = torch.randint(5, 50, (3, 7))
    padded = torch.cat((ids, torch.randint(0, 50, (3, 5))), dim=1)
    mask = (torch.arange(12) < 7).to(torch.int64).expand(3, 12)
    with torch.no_grad():
        logits, hidden = model(ids, torch.ones_like(ids))
        padded_logits, padded_hidden = model(padded, mask)
    assert logits.std() > 0.01
    assert torch.allclose(padded_logits, logits, atol=1e-5)
    assert torch.allclose(padded_hidden[:, :7], hidden, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_row_of_padding_alone_gives_numbers(pooling: str) -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with torch.no_grad():
        logits, _ = network(pooling=pooling)(ids, ids)
    assert logits.isfinite().all()


@pytest.mark.parametrize("changed", ["token", "order", "type"])
def test_the_answer_depends_on_tokens_their_order_and_their_type(changed: str) -> None:
    model = network()
    ids = torch.tensor([[CLS, 11, 12, SEP, 13, SEP]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1]])
    other = torch.tensor([[CLS, 12, 11, SEP, 13, SEP]]) if changed == "order" else ids.clone()
    if changed == "token":
        other[0, 1] = 20
    with torch.no_grad():
        logits, _ = model(ids, torch.ones_like(ids), types)
        others, _ = model(other, torch.ones_like(ids), None if changed == "type" else types)
    assert not torch.allclose(logits, others, atol=1e-3)


@pytest.mark.parametrize(
    "recipe", [SMALL, dataclasses.replace(SMALL, pooling="cls", norm="post"), PRETRAINING]
)
def test_every_parameter_gets_a_gradient_and_the_first_loss_is_that_of_ignorance(recipe: bert.Recipe) -> None:
    recipe = dataclasses.replace(recipe, batch_size=128)
    task = bert.task(recipe, None)
    loss = task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0))))
    assert loss.item() == pytest.approx(task.first_loss, rel=0.1)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    idle = {
        name
        for name, weight in task.model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    }
    assert not idle


def test_words_are_guessed_with_the_embeddings_own_weights() -> None:
    model = network()
    assert model.words is not None
    assert model.words.decoder.weight is model.encoder.tokens.weight
    assert network(guesses_words=False).words is None


def test_replaced_tokens_have_the_papers_shares() -> None:
    ids = torch.randint(len(SPECIAL_TOKENS), 1000, (1000, 200))
    ids[:, 0], ids[:, -1] = CLS, 0
    replaced, targets = replace_tokens(ids, 1000, torch.Generator().manual_seed(0))
    chosen = targets != IGNORED
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(replaced[~chosen], ids[~chosen])
    # 198 000 tokens, 29 700 of them chosen: each bound is over four standard errors away.
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.15, abs=0.004)
    masked = replaced[chosen] == MASK
    kept = replaced[chosen] == ids[chosen]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.01)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.008)
    others = replaced[chosen][~masked & ~kept]
    assert others.min() >= len(SPECIAL_TOKENS)
    assert len(set(others.tolist())) > 900


def test_a_pair_is_two_parts_between_marks() -> None:
    row, second = joined(np.array([11, 12]), np.array([21, 22, 23]), 20)
    assert (row.tolist(), second) == ([CLS, 11, 12, SEP, 21, 22, 23, SEP], 4)
    shortened, second = joined(np.arange(5, 25), np.arange(25, 45), 12)
    assert (shortened.tolist(), second) == ([CLS, 5, 6, 7, 8, SEP, 25, 26, 27, 28, SEP], 6)


def test_a_text_is_cut_anywhere_and_no_part_is_empty() -> None:
    row = np.arange(10)
    cuts = [len(part(row, where)[0]) for where in np.linspace(0, 1, 1000, endpoint=False)]
    assert set(cuts) == set(range(1, 10))
    assert np.concatenate(part(row, 0.4)).tolist() == row.tolist()


def test_pairs_are_labelled_by_whether_they_are_of_one_text() -> None:
    # Each text is a token of its own, six times, so that a part says where it is from.
    corpus = Corpus([np.full(6, 10 + index) for index in range(40)], vocabulary=50, context=15)
    batch = corpus.batch(torch.arange(40).repeat(20), torch.Generator().manual_seed(0))
    original = torch.where(batch.targets == IGNORED, batch.ids, batch.targets)
    words = original >= len(SPECIAL_TOKENS)
    first, second = (((original * words) * (batch.types == kind)).amax(1) for kind in (0, 1))
    assert torch.equal(first == second, batch.next.bool())
    assert 0.4 < batch.next.float().mean() < 0.6
    assert (original == SEP).sum(1).eq(2).all()
    assert ((original == SEP) & (batch.types == 1)).sum(1).eq(1).all()
    assert batch.types[batch.mask == 0].eq(0).all()
    # Two parts of one text have six tokens together; those of two texts may have as many, or not.
    tokens = words.sum(1)
    assert tokens[batch.next == 1].eq(6).all()
    assert len(set(tokens[batch.next == 0].tolist())) > 5


def test_texts_that_cannot_be_cut_make_no_pairs() -> None:
    encoded = [np.array([CLS, *tokens, SEP]) for tokens in ([], [9], [9, 8], [7, 6, 5])]
    assert [row.tolist() for row in Corpus.of(encoded, 50, 12).rows] == [[9, 8], [7, 6, 5]]
    with pytest.raises(DataError, match="expected two texts or more of two tokens or more to pair, got 1"):
        Corpus.of(encoded[:3], 50, 12)


def test_rows_to_judge_by_have_the_same_masks_each_time_and_training_rows_have_not() -> None:
    rows = [np.random.default_rng(index).integers(5, 50, 10) for index in range(300)]
    corpus = Corpus(rows, vocabulary=50, context=12)
    first, again = list(corpus.fixed_batches()), list(corpus.fixed_batches())
    assert sum(len(batch.ids) for batch in first) == 300
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat([batch.targets for batch in corpus.batches(30, generator)]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert evaluate(network(), corpus) == evaluate(network(), corpus)


def test_a_batch_without_words_to_guess_costs_nothing() -> None:
    hidden = torch.randn(2, 3, 16)
    assert word_loss(network(), hidden, torch.full((2, 3), IGNORED)).item() == 0


def test_dropped_words_are_masked_and_never_the_marks() -> None:
    ids = torch.randint(len(SPECIAL_TOKENS), 50, (100, 100))
    ids[:, 0], ids[:, 50:] = CLS, 0
    changed, targets = drop_words(ids, 0.3, torch.Generator().manual_seed(0))
    dropped = targets != IGNORED
    assert torch.equal(dropped, changed != ids)
    assert changed[dropped].eq(MASK).all()
    assert dropped[:, 1:50].float().mean() == pytest.approx(0.3, abs=0.03)
    assert not dropped[:, [0, 60]].any()


def test_a_short_run_beats_the_majority_class(classifier: Path) -> None:
    info = load_checkpoint(classifier).info
    assert info.metrics["test_accuracy"] > info.baselines["majority class"] + 0.1


def test_pre_training_beats_the_tokens_frequencies(pretrained: Path, tmp_path: Path) -> None:
    info = load_checkpoint(pretrained).info
    assert set(info.metrics) >= {"validation_loss", "test_loss", "test_mlm_accuracy", "test_nsp_accuracy"}
    recipe = dataclasses.replace(PRETRAINING, train_rows=3000, batch_size=32, epochs=2)
    task = bert.task(recipe, None)
    assert fitted(task, recipe, tmp_path / "run")["test_loss"] < task.trivial.test


def test_a_classifier_takes_over_encoder_and_vocabulary(pretrained: Path) -> None:
    source = load_checkpoint(pretrained)
    recipe = dataclasses.replace(SMALL, init_from=str(pretrained), vocabulary=300, train_rows=64)
    task = bert.task(recipe, None)
    assert task.files[TOKENIZER] == source.files[TOKENIZER]
    assert task.arguments["vocabulary"] == source.info.model["vocabulary"] == 800
    taken = cast("Bert", task.model).encoder.state_dict()
    for name, weight in cast("Bert", source.model).encoder.state_dict().items():
        assert torch.equal(taken[name], weight)
    fresh = cast("Bert", bert.task(dataclasses.replace(recipe, init_from=""), None).model)
    assert not torch.equal(fresh.encoder.positions.weight, taken["positions.weight"])


def test_another_shape_than_the_pre_trained_one_is_refused(pretrained: Path) -> None:
    recipe = dataclasses.replace(SMALL, init_from=str(pretrained), width=64)
    with pytest.raises(ValueError, match=f"--width: expected 32 as in {pretrained}, got 64"):
        bert.task(recipe, None)


def test_the_auxiliary_loss_guesses_the_dropped_words() -> None:
    recipe = dataclasses.replace(SMALL, word_dropout=0.3, mlm_weight=0.5, label_smoothing=0.0)
    task = bert.task(recipe, None)
    ids, targets, mask, labels = next(task.batches(torch.Generator().manual_seed(0)))
    model = cast("Bert", task.model.eval())
    with torch.no_grad():
        logits, hidden = model(ids, mask)
        expected = nn.functional.cross_entropy(logits, labels) + 0.5 * word_loss(model, hidden, targets)
        assert task.loss(model, (ids, targets, mask, labels)).item() == pytest.approx(expected.item())
    assert "words.decoder.bias" in model.state_dict()


def served(folder: Path) -> ServingGraph:
    (graph,) = bert.serving_graphs(load_checkpoint(folder), None)
    return graph


def test_the_serving_graph_of_a_classifier_scores_as_the_run_did(classifier: Path) -> None:
    graph = served(classifier)
    assert graph.data.labels == ("negative", "positive")
    inputs = [torch.from_numpy(graph.data.held_out[name]) for name in ("input_ids", "attention_mask")]
    assert inputs[0].shape == (4000, 24)
    assert graph.data.calibration["input_ids"].shape == (512, 24)
    with torch.no_grad():
        logits = graph.module(*inputs)
        example = graph.module(*graph.example.tensors.values())
    assert (logits.dtype, logits.shape, example.shape) == (torch.float32, (4000, 2), (2, 2))
    score = graph.metric.score({"logits": logits.numpy()}, graph.data.targets)
    expected = load_checkpoint(classifier).info.metrics["test_accuracy"]
    assert score == pytest.approx(expected, abs=0.002)  # another padding rounds otherwise


def test_rows_of_other_lengths_are_of_tokens_with_and_without_padding(
    classifier: Path, pretrained: Path
) -> None:
    for graph in (served(classifier), served(pretrained)):
        lengths = {other["input_ids"].shape[1] for other in graph.data.other_shapes}
        assert {1, 2} <= lengths
        assert 24 in {*lengths, graph.data.held_out["input_ids"].shape[1]}
        for other in graph.data.other_shapes:
            ids, mask = other["input_ids"], other["attention_mask"]
            length = ids.shape[1]
            assert mask.sum(1).tolist() == [length, length, *[max(1, length // 2)] * 2]
            assert np.array_equal(ids != 0, mask == 1)
            with torch.no_grad():
                answers = graph.module(torch.from_numpy(ids), torch.from_numpy(mask))
                cut = int(mask[3].sum())
                alone = graph.module(torch.from_numpy(ids[3:, :cut]), torch.from_numpy(mask[3:, :cut]))
            assert len(answers) == 4
            padded = answers[3:, :cut] if answers.ndim == 3 else answers[3:]
            assert torch.allclose(padded, alone, atol=1e-5)
    assert served(pretrained).metric.relative
    assert not served(classifier).metric.relative


def test_the_serving_graph_of_a_pre_trained_network_guesses_words(pretrained: Path) -> None:
    graph = served(pretrained)
    inputs = [torch.from_numpy(graph.data.held_out[name]) for name in ("input_ids", "attention_mask")]
    with torch.no_grad():
        logits = graph.module(*inputs)
    assert logits.shape == (*inputs[0].shape, 800)
    loss = graph.metric.score({"logits": logits.numpy()}, graph.data.targets)
    assert 0 < loss < 1.2 * np.log(800)
    assert (inputs[0] == MASK).any()


def test_the_masked_loss_counts_only_words_to_guess() -> None:
    logits = np.zeros((1, 3, 4), np.float32)
    logits[0, 0, 2] = 50
    assert masked_loss({"logits": logits}, np.array([[2, IGNORED, IGNORED]])) == pytest.approx(0, abs=1e-5)
    assert masked_loss({"logits": logits}, np.array([[IGNORED, 1, 2]])) == pytest.approx(np.log(4))


@pytest.mark.parametrize("name", list(bert.RECIPES))
def test_every_recipe_names_its_data_and_can_be_made(name: str) -> None:
    recipe = bert.RECIPES[name]
    assert bert.Recipe.from_mapping(dataclasses.asdict(recipe)) == recipe
    assert recipe.sample or recipe.data in ("nsmc", "sst2")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"heads": 3}, "--width: expected a multiple of 3 heads, got 128"),
        ({"data": "imdb"}, "--data: expected one of nsmc, sst2, got 'imdb'"),
        ({"task": "translate"}, "--task: expected one of classify, pretrain, got 'translate'"),
        ({"context": 4}, "--context: expected at least 8, got 4"),
        ({"word_dropout": 1.0}, "--word-dropout: expected from 0 to below 1, got 1.0"),
        ({"mlm_weight": 0.1}, "--mlm-weight: expected 0 without --word-dropout"),
        ({"train_rows": 3}, "--train-rows: expected 0 or at least a batch, got 3"),
        ({"validation_fraction": 0.0}, "--validation-fraction: expected between 0 and 1, got 0.0"),
    ],
)
def test_a_recipe_refuses_what_makes_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        bert.Recipe(**change)  # type: ignore[arg-type]  # wrong values are the point
