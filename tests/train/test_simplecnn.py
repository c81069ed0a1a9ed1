import dataclasses

import pytest
import torch
from torch import nn

from train import simplecnn
from train.simplecnn import SimpleCnn

RECIPE = simplecnn.Recipe(sample=True, train_rows=64, batch_size=16, channels=4, hidden=16)


def test_it_has_two_convolutions_and_two_linear_layers() -> None:
    model = SimpleCnn(classes=10, inputs=1, size=28, channels=32, hidden=128, dropout=0.5)
    kinds = [type(layer) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear]


@pytest.mark.parametrize(("size", "inputs"), [(28, 1), (32, 3), (30, 3)])
def test_any_image_size_gives_logits(size: int, inputs: int) -> None:
    model = SimpleCnn(classes=7, inputs=inputs, size=size, channels=4, hidden=8, dropout=0.0)
    assert model(torch.zeros(2, inputs, size, size)).shape == (2, 7)


def test_every_parameter_gets_a_gradient() -> None:
    task = simplecnn.task(RECIPE, None)
    loss = task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0))))
    assert float(loss.detach()) == pytest.approx(task.first_loss, rel=0.1)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    missing = [
        name
        for name, weight in task.model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert not missing


def test_dropout_is_on_in_training_alone() -> None:
    model = simplecnn.task(dataclasses.replace(RECIPE, dropout=0.5), None).model
    pixels = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels), model(pixels))
        assert not torch.equal(model.train()(pixels), model(pixels))


def test_half_an_epoch_beats_the_trivial_answer() -> None:
    recipe = dataclasses.replace(RECIPE, train_rows=0, batch_size=64, channels=8, hidden=32, dropout=0.0)
    task = simplecnn.task(recipe, None)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    for _, batch in zip(range(30), task.batches(torch.Generator().manual_seed(0)), strict=False):
        optimizer.zero_grad()
        task.loss(task.model.train(), batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    assert task.validate(task.model) > task.trivial.validation + 0.2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"channels": 0}, "--channels: expected at least 1, got 0"),
        ({"hidden": 0}, "--hidden: expected at least 1, got 0"),
        ({"dropout": 1.0}, "--dropout: expected from 0 to below 1, got 1.0"),
    ],
)
def test_a_recipe_refuses_what_makes_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        simplecnn.Recipe(**change)  # type: ignore[arg-type]  # wrong values are the point
