from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from train import mobilenet
from train.family import Task
from train.loop import Trainer

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Torch's threads spin while they wait: beside another busy process two are six times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def real_data() -> Path:
    """The folder with the original data sets, a folder each, beside the checkout."""
    if not REAL_DATA.is_dir():
        pytest.skip("the original data sets are not beside this checkout")
    return REAL_DATA


@pytest.fixture
def recipe() -> mobilenet.Recipe:
    """Small enough for a second an epoch, with everything on that draws random numbers."""
    return mobilenet.Recipe(
        sample=True,
        train_rows=64,
        validation_fraction=0.01,
        epochs=2,
        batch_size=16,
        learning_rate=5e-3,
        width=0.1,
        dropout=0.2,
        ema_decay=0.5,
        shift=2,
        flip=True,
    )


@pytest.fixture
def make_trainer(recipe: mobilenet.Recipe, tmp_path: Path) -> MakeTrainer:
    """A fresh trainer with the same seed each time; its checkpoint goes to tmp_path / "run"."""

    def make(task: Task | None = None, recipe: mobilenet.Recipe = recipe, out: str = "run") -> Trainer:
        return Trainer(
            task or mobilenet.task(recipe, None),
            recipe,
            tmp_path / out,
            family="mobilenet",
            device=torch.device("cpu"),
        )

    return make
