import dataclasses

import numpy as np
import pytest
import torch

from train import mobilenet
from train.augmentation import augment
from train.checkpoint import Checkpoint, CheckpointInfo
from train.classification import ACCURACY
from train.data import fashion_mnist
from train.data.download import DataError
from train.image_classification import (
    PixelInput,
    accuracy,
    example_inputs,
    image_arguments,
    serving_data,
    split_rows,
)
from train.mobilenet import InvertedResidual, MobileNetV2, MobileNetV3Small, SqueezeExcitation, scaled

ARGUMENTS = {
    "classes": 10,
    "channels": 1,
    "image_size": 28,
    "mean": [0.25],
    "std": [0.5],
    "version": "v2",
    "width": 0.1,
    "stem": "small",
    "dropout": 0.0,
}


# The V2 paper says 3.4 M, the V3 paper 2.5 M; their tables add up to these, norms and classifier included.
@pytest.mark.parametrize(
    ("network", "size", "features"), [(MobileNetV2, 3_504_872, 1280), (MobileNetV3Small, 2_542_856, 576)]
)
def test_the_papers_network_has_the_papers_size(
    network: type[MobileNetV2 | MobileNetV3Small], size: int, features: int
) -> None:
    model = network(classes=1000, channels=3, width=1.0, stem="imagenet", dropout=0.2)
    assert sum(weight.numel() for weight in model.parameters()) == size
    with torch.no_grad():
        assert model.eval().features(torch.zeros(1, 3, 224, 224)).shape == (1, features, 7, 7)


@pytest.mark.parametrize("network", [MobileNetV2, MobileNetV3Small])
@pytest.mark.parametrize("stem", ["small", "fine"])
@pytest.mark.parametrize("size", [28, 32])
def test_small_images_keep_their_resolution_longer(
    network: type[MobileNetV2 | MobileNetV3Small], stem: str, size: int
) -> None:
    model = network(classes=10, channels=1, width=0.1, stem=stem, dropout=0.0).eval()
    with torch.no_grad():
        assert model.features(torch.zeros(1, 1, size, size)).shape[2:] == (4, 4)


@pytest.mark.parametrize("version", ["v2", "v3-small"])
def test_every_parameter_gets_a_gradient(recipe: mobilenet.Recipe, version: mobilenet.Version) -> None:
    task = mobilenet.task(dataclasses.replace(recipe, version=version), None)
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
    block = InvertedResidual(inputs, 6 * inputs, outputs, stride=stride).eval()
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


def test_squeeze_and_excitation_weighs_channels_by_factors_up_to_one() -> None:
    block = SqueezeExcitation(16).eval()
    features = torch.rand(2, 16, 5, 5) + 1
    with torch.no_grad():
        factors = block(features) / features
    assert torch.allclose(factors, factors[:, :, :1, :1].expand_as(factors), atol=1e-6)
    assert factors.min() >= 0
    assert factors.max() <= 1
    assert factors.std() > 0


def test_an_untrained_network_finds_all_classes_equally_likely(recipe: mobilenet.Recipe) -> None:
    task = mobilenet.task(dataclasses.replace(recipe, train_rows=0, batch_size=500), None)
    assert task.first_loss == pytest.approx(np.log(10))
    with torch.no_grad():
        loss = task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0))))
    assert float(loss) == pytest.approx(task.first_loss, rel=0.1)


def test_the_loss_is_computed_in_float32_whatever_the_network_is(recipe: mobilenet.Recipe) -> None:
    task = mobilenet.task(recipe, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0))))
    assert loss.dtype == torch.float32


def test_the_trivial_answer_is_the_commonest_class(recipe: mobilenet.Recipe) -> None:
    trivial = mobilenet.task(recipe, None).trivial
    assert trivial.name == "majority class"
    assert trivial.test == 0.1  # the sample has 350 test rows of each class
    assert 0 < trivial.validation < 0.3


def test_mean_and_deviation_are_those_of_the_training_pixels() -> None:
    data = fashion_mnist.load_sample()
    arguments = image_arguments(data)
    assert arguments["mean"] == pytest.approx([data.train_images.mean() / 255], abs=1e-4)
    assert arguments["std"] == pytest.approx([data.train_images.std() / 255], abs=1e-4)
    blank = dataclasses.replace(data, train_images=np.zeros_like(data.train_images))
    assert image_arguments(blank)["std"][0] > 0


def test_the_serving_graph_normalizes_bytes_and_ends_in_logits(recipe: mobilenet.Recipe) -> None:
    model = mobilenet.build_model(ARGUMENTS).eval()
    info = CheckpointInfo(
        "mobilenet", ARGUMENTS, dataclasses.asdict(recipe), {}, {}, "fashion_mnist (sample)", "", 0, 0, {}
    )
    (graph,) = mobilenet.serving_graphs(Checkpoint(info, model, {}), None)
    assert (graph.suffix, graph.metric) == ("", ACCURACY)
    assert len(graph.data.labels) == 10
    image = torch.randint(0, 256, (3, 28, 28, 1), dtype=torch.uint8)
    normalized = (image.permute(0, 3, 1, 2) / 255 - 0.25) / 0.5
    with torch.no_grad():
        logits = graph.module(image)
        assert torch.allclose(logits, model(normalized), atol=1e-5)
    assert (logits.dtype, logits.shape) == (torch.float32, (3, 10))


def test_example_inputs_fit_the_serving_module() -> None:
    example = example_inputs(ARGUMENTS)
    image = example.tensors["image"]
    assert (image.dtype, image.shape) == (torch.uint8, (2, 28, 28, 1))
    assert example.dynamic_axes == {"image": {0: "batch"}}
    assert example.outputs == ("logits",)
    assert PixelInput(mobilenet.build_model(ARGUMENTS), ARGUMENTS).eval()(image).shape == (2, 10)


def test_serving_data_calibrates_on_rows_that_were_fitted(recipe: mobilenet.Recipe) -> None:
    recipe = dataclasses.replace(recipe, train_rows=100)
    data = serving_data(dataclasses.asdict(recipe), None)
    assert data.calibration["image"].shape == (100, 28, 28, 1)
    assert data.held_out["image"].shape == (3500, 28, 28, 1)
    assert data.targets.shape == (3500,)
    task = mobilenet.task(dataclasses.replace(recipe, shift=0, flip=False, batch_size=100), None)
    fitted, _ = next(task.batches(torch.Generator()))
    rows = {row.tobytes() for row in data.calibration["image"]}
    assert rows == {row.numpy().tobytes() for row in fitted}


def test_accuracy_is_the_share_of_right_classes() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert ACCURACY.score({"logits": logits}, np.array([0, 1, 2, 0])) == 0.75
    assert ACCURACY.gain(0.75, over=0.5) == 0.25


def test_accuracy_is_the_same_in_batches_and_at_once() -> None:
    model = mobilenet.build_model(ARGUMENTS)
    data = fashion_mnist.load_sample()
    images, labels = data.test_images[:700], data.test_labels[:700]  # a whole batch and a part of one
    with torch.no_grad():
        logits = PixelInput(model, ARGUMENTS).eval()(torch.from_numpy(images)).numpy()
    assert accuracy(model, ARGUMENTS, images, labels) == pytest.approx(
        ACCURACY.score({"logits": logits}, labels), abs=0.003
    )


def test_batches_are_whole_and_the_same_for_the_same_generator(recipe: mobilenet.Recipe) -> None:
    task = mobilenet.task(dataclasses.replace(recipe, train_rows=70), None)
    first, again = (list(task.batches(torch.Generator().manual_seed(1))) for _ in range(2))
    assert len(first) == task.steps_per_epoch == 4  # of 16; 6 rows are left out
    assert [len(labels) for _, labels in first] == [16] * 4
    for batch, same in zip(first, again, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(batch, same, strict=True))
    other, _ = next(task.batches(torch.Generator().manual_seed(2)))
    assert not torch.equal(other, first[0][0])


def test_a_batch_larger_than_the_data_is_refused(recipe: mobilenet.Recipe) -> None:
    with pytest.raises(DataError, match="--batch-size: expected at most 4356, the training rows, got 5000"):
        mobilenet.task(dataclasses.replace(recipe, train_rows=0, batch_size=5000), None)


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


def test_erasing_blackens_one_square_that_may_reach_over_the_border() -> None:
    images = torch.full((300, 12, 10, 3), 200, dtype=torch.uint8)
    erased = augment(images, shift=0, flip=False, erase=4, generator=torch.Generator().manual_seed(0))
    assert erased.dtype == torch.uint8
    black = (erased == 0).all(dim=3)
    assert torch.equal(black, (erased != 200).any(dim=3))  # all channels of a pixel, or none
    areas = black.sum(dim=(1, 2))
    assert areas.max() == 16
    assert areas.min() >= 1
    heights, widths = black.any(dim=2).sum(dim=1), black.any(dim=1).sum(dim=1)
    assert torch.equal(heights * widths, areas)  # a rectangle without gaps
    assert black.any(dim=0).all()  # it comes everywhere


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"width": 0.0}, "--width: expected above 0, got 0.0"),
        ({"stem": "large"}, "--stem: expected one of imagenet, small, fine, got 'large'"),
        ({"version": "v1"}, "--version: expected one of v2, v3-small, got 'v1'"),
        ({"data": "coco"}, "--data: expected one of fashion_mnist, mnist, cifar10, folder, got 'coco'"),
        ({"image_size": 4}, "--image-size: expected at least 8, got 4"),
        ({"erase": -1}, "--erase: expected at least 0, got -1"),
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected above 0, got nan"),
        ({"train_rows": 3}, "--train-rows: expected 0 or at least a batch, got 3"),
    ],
)
def test_a_recipe_refuses_what_makes_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mobilenet.Recipe(**change)  # type: ignore[arg-type]  # wrong values are the point
