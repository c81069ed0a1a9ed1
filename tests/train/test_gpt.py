import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from train import gpt
from train.checkpoint import (
    TOKENIZER,
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    current_versions,
    save_checkpoint,
)
from train.data.download import DataError
from train.data.tinyshakespeare import load_sample
from train.family import Task
from train.gpt_classification import GPTClassifier, classifier_loss, encode_rows
from train.sampling import filter_logits, main, sample
from train.sentence_classification import pad
from train.tokenization import encode, from_json
from train.transformer import GPT, Block, CausalSelfAttention, ChannelDropout, causal_attention, initialize

TINY = gpt.Recipe(
    layers=2, heads=2, width=32, context=16, batch_size=16, learning_rate=1e-2, steps_per_epoch=150
)
SENTENCES = dataclasses.replace(TINY, task="classify", sentences="nsmc", tokenizer="bpe", vocabulary=300)


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a text that is tokenized in no time."""
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(load_sample().train[:40_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tiny(play: str) -> gpt.Recipe:
    return dataclasses.replace(TINY, data="file", text_file=play)


@pytest.fixture(scope="module")
def language(tiny: gpt.Recipe) -> Task:
    return gpt.task(tiny, None)


@pytest.fixture(scope="module")
def classify() -> Task:
    return gpt.task(SENTENCES, None)


@pytest.fixture
def network() -> GPT:
    torch.manual_seed(0)
    model = GPT(
        vocabulary=11, layers=2, heads=2, width=16, context=8, dropout=0.0, channel_dropout=0.0, bias=True
    ).eval()
    initialize(model, "gpt2")
    return model


def information(task: Task, recipe: gpt.Recipe) -> CheckpointInfo:
    return CheckpointInfo(
        family="gpt",
        model=task.arguments,
        recipe=dataclasses.asdict(recipe),
        metrics={},
        baselines={},
        dataset=task.dataset,
        dataset_sha256=task.dataset_sha256,
        seed=0,
        epoch=1,
        versions=current_versions(),
    )


def save(task: Task, recipe: gpt.Recipe, folder: Path) -> str:
    save_checkpoint(folder, information(task, recipe), task.model, {}, task.files)
    return str(folder)


def text_recipe(tmp_path: Path, text: str, **fields: Any) -> gpt.Recipe:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return dataclasses.replace(TINY, data="file", text_file=str(tmp_path / "text.txt"), **fields)


# The network


@torch.no_grad()
def test_no_logit_depends_on_a_later_token(network: GPT) -> None:
    ids = torch.randint(11, (3, 8))
    before = network(ids)
    for changed in range(8):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % 11
        after = network(other)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.allclose(after[:, changed], before[:, changed])


@torch.no_grad()
def test_attention_written_out_is_the_fused_one() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, 9, 16, generator=generator) for _ in range(3))
    fused = causal_attention(queries, keys, values, 0.0)
    written_out = causal_attention(queries.bfloat16(), keys.bfloat16(), values.bfloat16(), 0.0)
    assert written_out.dtype == torch.bfloat16
    assert torch.allclose(written_out.float(), fused, atol=0.05)  # 8 bits of precision
    mean_so_far = values.cumsum(dim=2) / torch.arange(1, 10)[:, None]
    assert torch.allclose(
        causal_attention(torch.zeros_like(queries), keys, values, 0.0), mean_so_far, atol=1e-5
    )


def test_embeddings_are_the_output_layer(network: GPT) -> None:
    block = 12 * 16 * 16 + 9 * 16 + 4 * 16  # four matrices' weights, their biases, two norms
    assert sum(weight.numel() for weight in network.parameters()) == 11 * 16 + 8 * 16 + 2 * block + 2 * 16
    hidden = torch.randn(1, 1, 16)
    assert torch.allclose(network.logits(hidden)[0, 0], network.tokens.weight @ hidden[0, 0], atol=1e-6)


def test_gpt2_scales_what_blocks_add() -> None:
    torch.manual_seed(0)
    arguments = {
        "vocabulary": 65,
        "layers": 8,
        "heads": 4,
        "width": 64,
        "context": 16,
        "dropout": 0.0,
        "channel_dropout": 0.0,
    }
    model = gpt.build_model({**arguments, "bias": True, "initialization": "gpt2"})
    for module in model.modules():
        if isinstance(module, Block | CausalSelfAttention):
            assert module.projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        if isinstance(module, Block):
            assert module.expansion.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.expansion.bias.any()
    model = gpt.build_model({**arguments, "bias": False, "initialization": "xavier"})
    assert isinstance(model, GPT)
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for module in model.modules():
        if isinstance(module, Block):
            assert module.expansion.bias is None
            assert module.expansion.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 320), rel=0.01)


# The language model


def test_the_first_loss_is_that_of_a_guess(language: Task) -> None:
    (batch,) = next(language.batches(torch.Generator().manual_seed(0)))
    vocabulary = language.arguments["vocabulary"]
    assert language.first_loss == math.log(vocabulary)
    assert language.loss(language.model, (batch,)).item() == pytest.approx(language.first_loss, rel=0.02)


@pytest.mark.parametrize("name", ["language", "classify"])
def test_every_parameter_gets_a_gradient(name: str, request: pytest.FixtureRequest) -> None:
    task: Task = request.getfixturevalue(name)
    task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0)))).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    missing = [
        name
        for name, weight in task.model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    task.model.zero_grad()
    assert not missing


def test_batches_are_windows_of_the_fitted_text(tmp_path: Path) -> None:
    text = "".join(chr(33 + index) for index in range(1000))  # each character once: a window has one place
    task = gpt.task(text_recipe(tmp_path, text), None)
    batches = [batch for (batch,) in task.batches(torch.Generator().manual_seed(3))]
    assert len(batches) == task.steps_per_epoch == 150
    ids = torch.cat(batches)
    assert (ids.dtype, ids.shape) == (torch.int64, (2400, 17))
    assert torch.equal(ids, ids[:, :1] + torch.arange(17))
    assert 45 <= ids.min() < 65  # the first 45 of 900 are held out
    assert 880 < ids.max() < 900
    again = [batch for (batch,) in task.batches(torch.Generator().manual_seed(3))]
    assert all(map(torch.equal, batches, again))


@pytest.mark.parametrize("count", [2, 8, 9, 10, 16, 17, 40])
@torch.no_grad()
def test_every_token_but_the_first_is_predicted_once(network: GPT, count: int) -> None:
    ids = np.random.default_rng(0).integers(0, 11, count)
    by_hand = []
    for position in range(1, count):
        start = (position - 1) // 8 * 8
        logits = network(torch.from_numpy(ids[None, start:position]))[0, -1]
        by_hand.append(-logits.log_softmax(dim=0)[ids[position]].item())
    assert len(by_hand) == count - 1
    assert gpt.nats_per_token(network.train(), ids, 8) == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert not network.training


def test_the_unigram_loss_by_hand() -> None:
    # Fitted a a a b, plus one of each of a b c: 4/7, 2/7, 1/7. The first of "c a b c" is not predicted.
    loss = gpt.unigram_loss(np.array([0, 0, 0, 1]), np.array([2, 0, 1, 2]), 3)
    assert loss == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)


def test_the_trivial_figure_looks_at_its_own_split(tmp_path: Path) -> None:
    text = "ab" * 22 + "b" + "a" * 855 + "b" * 100
    task = gpt.task(text_recipe(tmp_path, text), None)
    assert task.trivial.name == "unigram"
    assert task.trivial.test == pytest.approx(math.log(857))
    assert task.trivial.validation == pytest.approx(
        (22 * math.log(857 / 856) + 22 * math.log(857)) / 44, rel=0.05
    )


def test_a_short_run_beats_the_unigrams(tiny: gpt.Recipe) -> None:
    task = gpt.task(tiny, None)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=tiny.learning_rate)
    for batch in task.batches(torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    assert task.validate(task.model) < task.trivial.validation - 0.15
    scores = task.test(task.model)
    assert scores["loss"] < task.trivial.test - 0.2
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    # A byte per character; the first of 4 000 is not predicted.
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] * 3999 / 4000 / math.log(2))


def test_bits_per_byte_make_vocabularies_comparable(tmp_path: Path) -> None:
    text = "die Größe der Stadt\n" * 200
    recipe = text_recipe(tmp_path, text, tokenizer="bpe", vocabulary=270)
    task = gpt.task(recipe, None)
    with torch.no_grad():
        task.model.get_parameter("tokens.weight").zero_()  # every token costs log 270
    scores = task.test(task.model)
    test = text[int(0.9 * len(text)) :]
    count = len(encode(from_json(task.files[TOKENIZER]), test))
    assert scores["loss"] == pytest.approx(math.log(270))
    assert scores["bits_per_byte"] == pytest.approx((count - 1) * math.log2(270) / len(test.encode()))


def test_a_text_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected more than 16 tokens .* got 4; take a longer text"):
        gpt.task(text_recipe(tmp_path, "x" * 100), None)


def test_serving_data_is_windows_and_their_next_tokens(language: Task, tiny: gpt.Recipe) -> None:
    checkpoint = Checkpoint(information(language, tiny), language.model.eval(), language.files)
    graph, decode = gpt.serving_graphs(checkpoint, None)
    assert (graph.suffix, decode.suffix) == ("", "_generate")
    assert graph.generation is None
    assert decode.generation is not None
    assert decode.generation.context_length == 16
    held_out = graph.data.held_out["input_ids"]
    assert held_out.dtype == np.int64
    assert held_out.shape == (64, 16)
    assert np.array_equal(graph.data.targets[:, :-1], held_out[:, 1:])
    assert graph.data.calibration["input_ids"].shape == (64, 16)
    assert graph.example.dynamic_axes == {"input_ids": {0: "batch", 1: "time"}}
    vocabulary = language.arguments["vocabulary"]
    with torch.no_grad():
        logits = graph.module(*graph.example.tensors.values())
        assert (logits.dtype, logits.shape) == (torch.float32, (2, 16, vocabulary))
        assert graph.module(torch.zeros(3, 1, dtype=torch.int64)).shape == (3, 1, vocabulary)
        outputs = {"logits": graph.module(torch.from_numpy(held_out)).numpy()}
    by_rows = [
        gpt.nats_per_token(graph.module, np.append(row, targets[-1]), 16)
        for row, targets in zip(held_out, graph.data.targets, strict=True)
    ]
    perplexity = math.exp(np.mean(by_rows))
    assert graph.metric.score(outputs, graph.data.targets) == pytest.approx(perplexity, rel=1e-5)
    assert {inputs["input_ids"].shape[1] for inputs in graph.data.other_shapes} == {1, 9}


# Going on from a checkpoint


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path, language: Task) -> None:
    folder = save(language, TINY, tmp_path / "first")
    recipe = text_recipe(tmp_path, load_sample().train[:5000], init_from=folder, context=999, dropout=0.3)
    task = gpt.task(recipe, None)
    assert task.arguments == {**language.arguments, "dropout": 0.3}
    assert task.files == language.files
    weights = language.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in task.model.state_dict().items())


def test_a_classifier_takes_a_language_models_weights(tmp_path: Path, tiny: gpt.Recipe) -> None:
    before = gpt.task(dataclasses.replace(tiny, tokenizer="bpe", vocabulary=300), None)
    folder = save(before, TINY, tmp_path / "language")
    after = gpt.task(dataclasses.replace(SENTENCES, init_from=folder), None)
    assert isinstance(after.model, GPTClassifier)
    assert torch.equal(after.model.gpt.tokens.weight, before.model.get_parameter("tokens.weight"))
    assert after.files == before.files
    folder = save(after, SENTENCES, tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="--init-from takes a language model"):
        gpt.task(dataclasses.replace(TINY, init_from=folder), None)
    with pytest.raises(CheckpointError, match="only a language model can write"):
        main([folder])


def test_characters_that_the_first_run_never_saw_are_named(tmp_path: Path, language: Task) -> None:
    folder = save(language, TINY, tmp_path / "first")
    with pytest.raises(DataError, match=r"file text\.txt: '가': not among the"):
        gpt.task(text_recipe(tmp_path, "가" * 1000, init_from=folder), None)


# The classifier


@torch.no_grad()
def test_the_classifier_ignores_padding(classify: Task) -> None:
    ids = torch.randint(300, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[1, 7:] = 0
    model = classify.model.eval()
    logits = model(ids, mask)
    assert torch.equal(model(torch.where(mask == 1, ids, 0), mask), logits)
    for row, length in enumerate((4, 7)):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert torch.allclose(alone, logits[row : row + 1], atol=1e-6)
    assert not torch.allclose(model(ids, torch.ones_like(mask)), logits)


@torch.no_grad()
def test_the_language_models_loss_beside_the_classifiers(classify: Task) -> None:
    model = classify.model.eval()
    assert isinstance(model, GPTClassifier)
    ids, mask = pad([np.array([5, 6, 7]), np.array([9])])
    assert ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    labels = torch.tensor([0, 1])
    alone = functional.cross_entropy(model(ids, mask), labels)
    following = functional.cross_entropy(model.gpt(ids[:1, :2])[0], torch.tensor([6, 7]))
    loss = classifier_loss(model, (ids, mask, labels), SENTENCES)
    assert loss.item() == pytest.approx((alone + 0.5 * following).item(), rel=1e-5)
    without = classifier_loss(model, (ids, mask, labels), dataclasses.replace(SENTENCES, auxiliary=0.0))
    assert without.item() == pytest.approx(alone.item())
    one_token = classifier_loss(model, (ids[1:, :2], mask[1:, :2], labels[1:]), SENTENCES)
    assert math.isfinite(one_token.item())


def test_rows_are_cut_to_the_context_and_never_empty(classify: Task) -> None:
    tokenizer = from_json(classify.files[TOKENIZER])
    long, empty = encode_rows(["a" * 100 + "b", ""], tokenizer, 16)
    assert long.tolist() == encode(tokenizer, "a" * 100 + "b")[:16].tolist()
    assert empty.tolist() == [0]


def test_a_classifiers_serving_data(classify: Task) -> None:
    checkpoint = Checkpoint(information(classify, SENTENCES), classify.model.eval(), classify.files)
    (graph,) = gpt.serving_graphs(checkpoint, None)
    held_out = graph.data.held_out
    rows = len(graph.data.targets)
    assert {name: (array.dtype, array.shape) for name, array in held_out.items()} == {
        "input_ids": (np.dtype(np.int64), (rows, 16)),
        "attention_mask": (np.dtype(np.int64), (rows, 16)),
    }
    assert held_out["attention_mask"].sum(axis=1).min() >= 1
    assert len(graph.data.labels) == 2
    with torch.no_grad():
        assert graph.module(*graph.example.tensors.values()).shape == (2, 2)
        outputs = {"logits": graph.module(*map(torch.from_numpy, held_out.values())).numpy()}
    assert graph.metric.score(outputs, graph.data.targets) == pytest.approx(
        classify.test(classify.model)["accuracy"]
    )


# Sampling


def draw(network: GPT, **settings: Any) -> list[int]:
    generator = torch.Generator().manual_seed(settings.pop("seed", 0))
    settings = {"tokens": 30, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    return list(sample(network, [1, 2, 3], generator=generator, **settings))


def test_greedy_takes_the_most_probable_whatever_the_seed(network: GPT) -> None:
    greedy = draw(network, temperature=0)
    assert len(greedy) == 30
    assert draw(network, temperature=0, seed=1) == greedy
    assert draw(network, top_k=1, seed=2) == greedy
    assert draw(network, top_p=1e-9, seed=3) == greedy
    assert draw(network, temperature=1e-30, seed=4) == greedy
    seen = [1, 2, 3, *greedy]
    with torch.no_grad():
        for position in range(3, 33):  # eight tokens are the context
            logits = network(torch.tensor([seen[max(0, position - 8) : position]]))
            assert logits[0, -1].argmax() == seen[position]


def test_draws_follow_the_seed(network: GPT) -> None:
    assert draw(network, seed=5) == draw(network, seed=5)
    assert draw(network, seed=5) != draw(network, seed=6)
    assert set(draw(network, tokens=200)) == set(range(11))


def test_top_k_keeps_so_many_even_among_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])
    assert filter_logits(logits, top_k=2, top_p=1.0).isfinite().sum() == 2
    kept = filter_logits(logits, top_k=4, top_p=1.0)
    assert torch.equal(kept, torch.tensor([-math.inf, 3.0, 2.0, 3.0, 3.0]))
    for top_k in (0, 5, 9):
        assert torch.equal(filter_logits(logits, top_k=top_k, top_p=1.0), logits)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_fewest_tokens_with_its_mass(top_p: float) -> None:
    for seed in range(50):
        logits = 3 * torch.randn(20, generator=torch.Generator().manual_seed(seed))
        probabilities = logits.softmax(dim=0).double()
        kept = filter_logits(logits, top_k=0, top_p=top_p).isfinite()
        assert probabilities[kept].sum() >= top_p - 1e-6
        assert probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-6  # one fewer is too few
        assert (~kept).sum() == 0 or probabilities[kept].min() >= probabilities[~kept].max()


def test_the_command_writes_on_from_the_prompt(
    tmp_path: Path, language: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(language, TINY, tmp_path / "run")
    arguments = [folder, "--prompt", "ROMEO:", "--tokens", "40", "--top-k", "20"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("ROMEO:")
    assert len(first) == 6 + 40 + 1
    main(arguments)
    assert capsys.readouterr().out == first
    main([*arguments, "--seed", "1"])
    assert capsys.readouterr().out != first


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt", "안녕"], "--prompt: '녕', '안': not among the"),
        (["--prompt", ""], "--prompt: expected at least one character, got ''"),
        (["--temperature", "-1"], "--temperature: expected at least 0, got -1.0"),
        (["--temperature", "nan"], "--temperature: expected at least 0, got nan"),
        (["--top-p", "0"], "--top-p: expected above 0, at most 1, got 0.0"),
        (["--top-k", "-1"], "--top-k: expected at least 0, got -1"),
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--temprature", "1"], "--temprature: unknown; did you mean --temperature?"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    tmp_path: Path, language: Task, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([save(language, TINY, tmp_path / "run"), *flags])
    assert complaint in capsys.readouterr().err


# The recipe


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"heads": 3}, "--width: expected a multiple of --heads, got 128"),
        ({"context": 1}, "--context: expected at least 2, got 1"),
        ({"data": "file"}, "--text-file: expected the path of a text with --data file, and"),
        ({"text_file": "a.txt"}, "--data file, and only then, got 'a.txt'"),
        ({"vocabulary": 100}, "--vocabulary: expected at least 256, one per byte, got 100"),
        ({"task": "translate"}, "--task: expected one of language, classify, got 'translate'"),
        ({"dropout": 1.0}, "--dropout: expected from 0 to below 1, got 1.0"),
        ({"steps_per_epoch": 0}, "--steps-per-epoch: expected at least 1, got 0"),
    ],
)
def test_a_recipe_refuses_what_makes_no_sense(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        gpt.Recipe(**change)


@pytest.mark.parametrize("name", sorted(gpt.RECIPES))
def test_recipes_take_a_step(name: str, play: str) -> None:
    recipe = dataclasses.replace(gpt.RECIPES[name], batch_size=2)
    if recipe.task == "language":
        recipe = dataclasses.replace(recipe, data="file", text_file=play)
    task = gpt.task(recipe, None)
    task.loss(task.model.train(), next(task.batches(torch.Generator()))).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    assert all(weight.grad is not None for weight in task.model.parameters())


def test_channel_dropout_drops_the_same_channels_along_a_text() -> None:
    torch.manual_seed(0)
    layer = ChannelDropout(0.25)
    states = torch.ones(64, 7, 32)
    dropped = layer(states)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert sorted(dropped.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(layer.eval()(states), states)
