import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from train import bert
from train.__main__ import main
from train.check import Finding, check_task, without_regularization
from train.data.fashion_mnist import load_sample
from train.family import FAMILIES, Metric, Task, Trivial
from train.recipe import Recipe

RECIPE = Recipe(batch_size=64, learning_rate=3e-3, label_smoothing=0.0, weight_decay=0.0)
ROWS = 2000
Batch = tuple[torch.Tensor, ...]


class Perceptron(nn.Module):
    """Pixels FP32 [batch, 784] to logits FP32 [batch, 10]."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 64)
        self.output = nn.Linear(64, 10)
        self.detached = detached

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.hidden(pixels).relu()
        logits: torch.Tensor = self.output(features.detach() if self.detached else features)
        return logits


@pytest.fixture(scope="module")
def pixels_and_labels() -> Batch:
    data = load_sample()
    images = torch.from_numpy(data.train_images).flatten(1) / 255
    return images, torch.from_numpy(data.train_labels)


MakeTask = Callable[..., Task]


@pytest.fixture
def make_task(pixels_and_labels: Batch) -> MakeTask:
    """A classifier's task with the faults that are asked for."""
    images, labels = pixels_and_labels
    held_out = images[ROWS:], labels[ROWS:]
    majority = float(held_out[1].bincount().max()) / len(held_out[1])

    def make(
        model: nn.Module | None = None,
        *,
        shuffled: bool = False,
        reduction: str = "mean",
        factor: float = 1.0,
    ) -> Task:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
        targets = labels[:ROWS][order] if shuffled else labels[:ROWS]

        def batches(generator: torch.Generator) -> Iterator[Batch]:
            rows = torch.randperm(ROWS, generator=generator)
            for start in range(0, ROWS - RECIPE.batch_size, RECIPE.batch_size):
                taken = rows[start : start + RECIPE.batch_size]
                yield images[taken], targets[taken]

        def loss(network: nn.Module, batch: Batch) -> torch.Tensor:
            return factor * functional.cross_entropy(network(batch[0]).float(), batch[1], reduction=reduction)

        def validate(network: nn.Module) -> float:
            with torch.no_grad():
                return float((network.eval()(held_out[0]).argmax(1) == held_out[1]).float().mean())

        torch.manual_seed(0)
        return Task(
            model=model or Perceptron(),
            arguments={},
            dataset="fashion_mnist (sample)",
            dataset_sha256="0" * 64,
            steps_per_epoch=ROWS // RECIPE.batch_size,
            batches=batches,
            loss=loss,
            first_loss=math.log(10),
            metric=Metric("accuracy", higher_is_better=True, score=lambda *_: 0.0),
            validate=validate,
            test=lambda _: pytest.fail("the test split is not looked at"),
            trivial=Trivial("majority class", majority, majority),
        )

    return make


def failed(findings: Iterable[Finding]) -> dict[str, str]:
    """Check to cause, of those that failed."""
    return {finding.check: finding.cause for finding in findings if not finding.passed}


def test_a_healthy_task_passes_and_stays_untrained(make_task: MakeTask) -> None:
    task = make_task()
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    findings = list(check_task(task, RECIPE))
    assert failed(findings) == {}
    assert len(findings) == 4
    assert all(torch.equal(weight, before[name]) for name, weight in task.model.state_dict().items())


def test_the_same_task_gives_the_same_figures(make_task: MakeTask) -> None:
    assert list(check_task(make_task(), RECIPE)) == list(check_task(make_task(), RECIPE))


def test_a_frozen_layer_is_named(make_task: MakeTask) -> None:
    model = Perceptron()
    model.hidden.weight.requires_grad = False
    causes = failed(check_task(make_task(model), RECIPE))
    assert causes["gradients"] == "hidden.weight is frozen (requires_grad is False)"


def test_a_layer_behind_detach_is_named(make_task: MakeTask) -> None:
    causes = failed(check_task(make_task(Perceptron(detached=True)), RECIPE))
    cut = "is not used in the loss, or is cut off from it by detach()"
    assert causes["gradients"] == f"hidden.weight {cut}; hidden.bias {cut}"


def test_a_dead_layer_is_named(make_task: MakeTask) -> None:
    model = Perceptron()
    nn.init.constant_(model.hidden.bias, -1000.0)  # no ReLU ever opens
    causes = failed(check_task(make_task(model), RECIPE))
    zero = "has a gradient of zero"
    assert causes["gradients"] == f"hidden.weight {zero}; hidden.bias {zero}; output.weight {zero}"
    assert causes["one batch by heart"].startswith("the network can't learn one batch by heart")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"reduction": "sum"}, "summed over the 64 rows of a batch instead of averaged"),
        ({"factor": 1 / 64}, "divided by the 64 rows of a batch once too often"),
        ({"factor": 10.0}, "the loss's scale is off by a factor of 10"),
        ({"factor": 0.1}, "the loss's scale is off by a factor of 0.1"),
        ({"factor": math.nan}, "the loss of the untrained network is not finite"),
    ],
)
def test_a_wrong_loss_scale_is_named(make_task: MakeTask, fault: dict[str, float], cause: str) -> None:
    assert failed(check_task(make_task(**fault), RECIPE))["first loss"] == cause


def test_an_initialization_that_is_too_large_is_told_from_the_losss_scale(make_task: MakeTask) -> None:
    model = Perceptron()
    with torch.no_grad():
        model.output.weight.mul_(100)
    causes = failed(check_task(make_task(model), RECIPE))
    assert causes["first loss"].startswith("initial logits too large")


def test_shuffled_labels_are_learned_by_heart_but_help_no_other_rows(make_task: MakeTask) -> None:
    causes = failed(check_task(make_task(shuffled=True), RECIPE))
    assert list(causes) == ["labels belong to rows"]
    assert "is not clearly better than majority class 0.1" in causes["labels belong to rows"]
    assert "labels are shuffled against the rows, or validation reads" in causes["labels belong to rows"]


def test_a_learning_rate_that_diverges_is_told_from_a_network_that_is_too_small(make_task: MakeTask) -> None:
    wild = replace(RECIPE, optimizer="sgd", learning_rate=1e4, clip_norm=0.0)
    assert failed(check_task(make_task(), wild))["one batch by heart"].endswith(
        "it diverges; lower --learning-rate"
    )


def test_regularization_is_switched_off_but_where_another_field_needs_it() -> None:
    bare = without_regularization(Recipe(label_smoothing=0.1, weight_decay=0.1, l1=1e-5, accumulate=4))
    assert (bare.label_smoothing, bare.weight_decay, bare.l1, bare.accumulate) == (0, 0, 0, 1)
    guessing = without_regularization(bert.Recipe(dropout=0.1, word_dropout=0.2, mlm_weight=0.5))
    assert isinstance(guessing, bert.Recipe)
    assert (guessing.dropout, guessing.word_dropout, guessing.mlm_weight) == (0, 0.2, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_with_its_quick_recipe(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", family, "--recipe", "quick"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{family}: ")
    assert len(lines) == 4
    assert all(" ok " in line for line in lines)


def test_a_failed_check_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train-rows", "64", "--width", "0.1", "--learning-rate", "1e30"]
    assert main(["check", "mobilenet", "--recipe", "quick", *flags]) == 1
    assert "one batch by heart     FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: family"),
        (["mobilenett"], "invalid choice: 'mobilenett'"),
        (["mobilenet", "--epoch", "1"], "--epoch: unknown; did you mean --epochs?"),
        (["mobilenet", "--width", "-1"], "--width: expected above 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
