import dataclasses

import numpy as np
import pytest
import torch

from train import mobilenet
from train.image_classification import augment, split_rows
from train.mobilenet import InvertedResidual, MobileNetV2, scaled

ARGUMENTS = {
    "classes": 10,
    "channels": 1,
    "image_size": 28,
    "mean": [0.25],
    "std": [0.5],
    "width": 0.1,
    "stem": "small",
    "dropout": 0.0,
}


def test_the_papers_network_has_the_papers_size() -> None:
    # The paper says 3.4 M; its table 2 adds up to this, norms and classifier included.
    model = MobileNetV2(classes=1000, channels=3, width=1.0, stem="imagenet", dropout=0.2)
    assert sum(weight.numel() for weight in model.parameters()) == 3_504_872
    with torch.no_grad():
        assert model.eval().features(torch.zeros(1, 3, 224, 224)).shape == (1, 1280, 7, 7)


@pytest.mark.parametrize("size", [28, 32])
def test_small_images_keep_their_resolution_longer(size: int) -> None:
    model = MobileNetV2(classes=10, channels=1, width=0.1, stem="small", dropout=0.0).eval()
    with torch.no_grad():
        assert model.features(torch.zeros(1, 1, size, size)).shape[2:] == (4, 4)


def test_every_parameter_gets_a_gradient(recipe: mobilenet.Recipe) -> None:
    task = mobilenet.task(recipe, None)
    loss = task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0))))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    missing = [
        name
        for name, weight in task.model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert not missing


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(8, 8, 1), (8, 16, 1), (8, 8, 2)])
def test_a_block_adds_its_input_where_shapes_allow(inputs: int, outputs: int, stride: int) -> None:
    block = InvertedResidual(inputs, outputs, stride, expansion=6).eval()
    features = torch.randn(2, inputs, 6, 6)
    with torch.no_grad():
        difference = block(features) - block.layers(features)
    same_shape = inputs == outputs and stride == 1
    assert torch.allclose(difference, features if same_shape else torch.tensor(0.0), atol=1e-5)


def test_channels_are_multiples_of_eight_and_never_much_fewer() -> None:
    for channels in (16, 24, 32, 64, 96, 160, 320, 1280):
        for width in (0.1, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4):
            result = scaled(channels, width)
            assert result % 8 == 0
            assert result >= 0.9 * channels * width
            assert result - channels * width <= 8
    assert scaled(32, 1.0) == 32


def test_the_serving_module_normalizes_bytes_in_the_graph() -> None:
    model = mobilenet.build_model(ARGUMENTS).eval()
    serving = mobilenet.serving_module(model, ARGUMENTS)
    image = torch.randint(0, 256, (3, 28, 28, 1), dtype=torch.uint8)
    normalized = (image.permute(0, 3, 1, 2) / 255 - 0.25) / 0.5
    with torch.no_grad():
        assert torch.allclose(serving(image), model(normalized), atol=1e-5)


def test_example_inputs_fit_the_serving_module() -> None:
    example = mobilenet.example_inputs(ARGUMENTS)
    image = example.tensors["image"]
    assert (image.dtype, image.shape) == (torch.uint8, (2, 28, 28, 1))
    assert example.dynamic_axes == {"image": {0: "batch"}}
    assert example.outputs == ("logits",)
    logits = mobilenet.serving_module(mobilenet.build_model(ARGUMENTS), ARGUMENTS)(image)
    assert (logits.dtype, logits.shape) == (torch.float32, (2, 10))


def test_serving_data_calibrates_on_rows_that_were_fitted(recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, train_rows=100)
    data = mobilenet.serving_data(dataclasses.asdict(recipe), None)
    assert data.calibration["image"].shape == (100, 28, 28, 1)
    assert data.held_out["image"].shape == (3500, 28, 28, 1)
    assert data.targets.shape == (3500,)
    assert len(data.labels) == 10
    task = mobilenet.task(dataclasses.replace(recipe, shift=0, flip=False, batch_size=100), None)
    fitted, _ = next(task.batches(torch.Generator()))
    rows = {row.tobytes() for row in data.calibration["image"]}
    assert rows == {row.numpy().tobytes() for row in fitted}


def test_metric_is_the_share_of_right_classes() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert mobilenet.metric({"logits": logits}, np.array([0, 1, 2, 0])) == 0.75


def test_fitted_and_held_out_rows_are_disjoint_whatever_the_seed(recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, train_rows=0, validation_fraction=0.1)
    fitted, held_out = split_rows(5000, recipe)
    assert (len(fitted), len(held_out)) == (4500, 500)
    assert not set(fitted) & set(held_out)
    assert np.array_equal(split_rows(5000, dataclasses.replace(recipe, seed=7))[1], held_out)


def test_augmentation_moves_and_mirrors_by_its_generator_alone() -> None:
    images = torch.zeros(200, 7, 7, 1, dtype=torch.uint8)
    images[:, 3, 4] = 9
    moved = augment(images, shift=2, flip=True, generator=torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8
    assert moved.sum(dim=(1, 2, 3)).eq(9).all()  # no pixel is lost or doubled
    _, rows, columns, _ = moved.nonzero(as_tuple=True)
    assert set(rows.tolist()) == {1, 2, 3, 4, 5}
    assert set(columns.tolist()) == {0, 1, 2, 3, 4, 5, 6}
    again = augment(images, shift=2, flip=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, moved)
    assert torch.equal(augment(images, shift=0, flip=False, generator=torch.Generator()), images)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"width": 0.0}, "--width: expected above 0, got 0.0"),
        ({"stem": "large"}, "--stem: expected one of imagenet, small, got 'large'"),
        ({"data": "imagenet"}, "--data: expected one of fashion_mnist, mnist, cifar10, got 'imagenet'"),
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected above 0, got nan"),
        ({"train_rows": 3}, "--train-rows: expected 0 or at least a batch, got 3"),
    ],
)
def test_a_recipe_refuses_what_makes_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mobilenet.Recipe(**change)  # type: ignore[arg-type]  # wrong values are the point
