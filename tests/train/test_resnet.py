import dataclasses

import pytest
import torch
from torch import nn

from train import resnet
from train.initialization import he_normal, xavier_uniform
from train.resnet import LAYOUTS, BasicBlock, Bottleneck, Residual, ResNet

RECIPE = resnet.Recipe(sample=True, train_rows=64, batch_size=16, width=0.5, shift=2, erase=6)
ARGUMENTS = {
    "classes": 10,
    "channels": 1,
    "image_size": 28,
    "depth": "20",
    "stem": "small",
    "width": 0.5,
    "zero_residual": True,
}


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    # What the paper's table 1 adds up to, norms and classifier included.
    ("depth", "size", "features"),
    [("18", 11_689_512, 512), ("34", 21_797_672, 512), ("50", 25_557_032, 2048)],
)
def test_the_imagenet_networks_have_the_papers_size(depth: str, size: int, features: int) -> None:
    model = ResNet(LAYOUTS[depth], classes=1000, channels=3, stem="imagenet", width=1.0).eval()
    assert parameters(model) == size
    with torch.no_grad():
        assert model.features(torch.zeros(1, 3, 64, 64)).shape == (1, features, 2, 2)  # 32 times smaller


@pytest.mark.parametrize(("depth", "size"), [("20", 272_474), ("56", 855_770)])
def test_the_cifar_networks_have_the_papers_size(depth: str, size: int) -> None:
    # The paper's 0.27 and 0.85 M, of which its shortcuts (option A) have none and these 2 752.
    model = ResNet(LAYOUTS[depth], classes=10, channels=3, stem="small", width=1.0).eval()
    assert parameters(model) == size
    with torch.no_grad():
        assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("depth", LAYOUTS)
def test_the_depth_is_the_number_of_layers_with_weights(depth: str) -> None:
    model = ResNet(LAYOUTS[depth], classes=10, channels=3, stem="small", width=0.125)
    shortcuts = {
        id(layer)
        for block in model.modules()
        if isinstance(block, Residual)
        for layer in block.shortcut.modules()
    }
    counted = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and id(layer) not in shortcuts
    ]
    assert len(counted) == int(depth)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_block_that_starts_as_the_identity_is_one(block: type[BasicBlock | Bottleneck]) -> None:
    same = block(8 * block.widening, 8, stride=1)
    last = [layer for layer in same.layers.modules() if isinstance(layer, nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)
    features = torch.rand(2, 8 * block.widening, 6, 6)  # not below zero, so that the last ReLU keeps it
    with torch.no_grad():
        assert torch.equal(same(features), features)
        assert block(8, 8, stride=2)(torch.rand(2, 8, 6, 6)).shape == (2, 8 * block.widening, 3, 3)


@pytest.mark.parametrize("zero", [True, False])
def test_residual_branches_start_at_zero_where_asked(zero: bool) -> None:  # noqa: FBT001 - a parameter of the test
    model = resnet.build_model({**ARGUMENTS, "zero_residual": zero})
    gains = [layer.weight.abs().sum() > 0 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    blocks = sum(isinstance(module, Residual) for module in model.modules())
    assert gains.count(False) == (blocks if zero else 0)  # type: ignore[arg-type]  # a tensor of one bool


def test_every_parameter_gets_a_gradient() -> None:
    task = resnet.task(dataclasses.replace(RECIPE, zero_residual=False), None)
    loss = task.loss(task.model.train(), next(task.batches(torch.Generator().manual_seed(0))))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    missing = [
        name
        for name, weight in task.model.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert not missing


def test_a_few_updates_lower_the_loss_of_a_batch() -> None:
    task = resnet.task(dataclasses.replace(RECIPE, width=0.25, label_smoothing=0.0), None)
    batch = next(task.batches(torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = task.loss(task.model.train(), batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(task.first_loss, rel=0.3)
    assert losses[-1] < losses[0] / 2


def test_the_seed_decides_the_first_weights() -> None:
    first, same, other = (
        resnet.task(dataclasses.replace(RECIPE, seed=seed), None).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_the_network_is_trained_with_channels_last() -> None:
    weight = dict(resnet.task(RECIPE, None).model.named_parameters())["features.2.layers.0.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"depth": "19"}, "--depth: expected one of 18, 20, 34, 50, 56, got '19'"),
        ({"stem": "large"}, "--stem: expected one of imagenet, small, got 'large'"),
        ({"width": 0.0}, "--width: expected above 0, got 0.0"),
    ],
)
def test_a_recipe_refuses_what_makes_no_sense(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        resnet.Recipe(**change)  # type: ignore[arg-type]  # wrong values are the point


# --- first weights ---


def test_he_keeps_to_convolutions_and_their_variance() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Linear(8, 8), nn.Embedding(5, 8))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    he_normal(model)
    after = model.state_dict()
    assert float(after["0.weight"].std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert not after["0.bias"].any()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("0."))


def test_xavier_keeps_to_linear_layers_that_are_no_embedding() -> None:
    embedding, output = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    output.weight = embedding.weight
    model = nn.ModuleList([nn.Linear(16, 48), embedding, output, nn.Conv1d(2, 2, 3), nn.LSTM(4, 4)])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    xavier_uniform(model)
    after = model.state_dict()
    bound = (6 / (16 + 48)) ** 0.5
    assert 0.9 * bound < float(after["0.weight"].abs().max()) <= bound
    assert not after["0.bias"].any()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("0."))


@pytest.mark.parametrize("values", [16, 8])
def test_xavier_takes_queries_keys_and_values_for_three_matrices(values: int) -> None:
    attention = nn.MultiheadAttention(16, 2, vdim=values)
    xavier_uniform(attention)
    same = values == 16  # torch keeps the three in one parameter only where their shapes agree
    weight = attention.in_proj_weight[32:] if same else attention.v_proj_weight
    bound = (6 / (16 + values)) ** 0.5
    assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
