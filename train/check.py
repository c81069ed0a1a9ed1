"""`python -m train check FAMILY`: find what is wrong with a network, its loss or its data before a long run.

Four checks, cheap ones first, each of which names the cause that it finds. They follow A. Karpathy, "A Recipe
for Training Neural Networks" (2019), part 2: the loss at initialization, one batch by heart, then real rows.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.family import FAMILIES, load_family
from train.flags import FlagParser, add_family_flags, chosen_recipe
from train.loop import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from train.family import Task
    from train.recipe import Recipe

Batch = tuple[torch.Tensor, ...]

REGULARIZATION = ("label_smoothing", "weight_decay", "l1", "l2", "ema_decay")
LOSS_TOLERANCE = 0.25  # the quick recipes of all families are within 0.05
LOSS_BATCHES = 4
GRADIENT_STEPS = 5  # a branch that begins at zero lets gradients through from its second step on
WARMUP_STEPS = 10
HEART_ROWS = 8
HEART_STEPS = 1000  # the LSTM, which learns noise by heart there, needs a third of them
HEART_LOSS = 0.05  # of the first loss
ROWS_STEPS = (25, 50, 100, 200, 400)  # after which validation is looked at
# Of what lies between the trivial answer and a perfect one, by metric. Accuracies of a few hundred rows are
# coarse, errors after few steps too; a masked language model was 1 % below its unigram after 400.
CLEAR_GAIN = {"accuracy": 0.1, "mse": 0.1, "loss": 0.005}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        passed: whether all is well.
        figures: what was measured, and what was expected.
        cause: where it failed: what is wrong, as far as the figures tell.
    """

    check: str
    passed: bool
    figures: str
    cause: str = ""

    def __str__(self) -> str:
        line = f"{self.check:<22} {'ok    ' if self.passed else 'FAILED'}  {self.figures}"
        return line if self.passed else f"{line}: {self.cause}"


def main(arguments: Sequence[str]) -> int:
    """Check the family that the first word names with the recipe that the other words describe.

    Returns:
        The exit code: 0, or 1 where a check failed.

    Raises:
        DataError: the data can't be read.
    """
    usage = "python -m train check FAMILY [flags]"
    words = FlagParser(prog="python -m train check", usage=usage, description=__doc__)
    words.add_argument("family", choices=FAMILIES, help="FAMILY --help lists its flags")
    name = words.parse(arguments[:1]).family
    family = load_family(name)
    parser = FlagParser(prog=f"python -m train check {name}", usage=usage.replace("FAMILY", name))
    add_family_flags(parser, family)
    parsed = parser.parse(arguments[1:])
    try:
        recipe = without_regularization(chosen_recipe(parsed, family))
        task = family.task(recipe, parsed.data_dir)
    except ValueError as error:
        parser.error(str(error))
    print(f"{name}: {task.dataset}, batches of {recipe.batch_size}, regularization switched off", flush=True)
    findings = []
    for finding in check_task(task, recipe):
        findings.append(finding)
        print(finding, flush=True)
    return 0 if all(finding.passed for finding in findings) else 1


def check_task(task: Task, recipe: Recipe) -> Iterator[Finding]:
    """Run the checks on the CPU; each begins with the task's untrained network, which stays as it is.

    Args:
        task: made from `recipe`.
        recipe: without what keeps a network from fitting its rows, see `without_regularization`.

    Yields:
        A finding per check; the last one, on other rows than those fitted, only where one batch was learned.
    """
    yield first_loss(task, recipe)
    yield gradients(task, recipe)
    heart = one_batch(task, recipe)
    yield heart
    if heart.passed:
        yield other_rows(task, recipe)


def without_regularization(recipe: Recipe) -> Recipe:
    """The recipe without penalties, dropout, smoothing and averaging, one batch per update."""
    recipe = replace(recipe, accumulate=1, compile=False)
    for field in fields(recipe):
        if field.name in REGULARIZATION or "dropout" in field.name:
            with contextlib.suppress(ValueError):  # another field needs this one
                recipe = replace(recipe, **{field.name: 0.0})  # type: ignore[arg-type]  # the name is data
    return recipe


def first_loss(task: Task, recipe: Recipe) -> Finding:
    """Whether the untrained network's loss is that of a network that knows nothing."""
    model = copy.deepcopy(task.model).train()
    batches = list(itertools.islice(endless(task, recipe), LOSS_BATCHES))
    found = mean_loss(task, model, batches)
    ratio = found / task.first_loss
    figures = f"{found:.4g}, expected about {task.first_loss:.4g}"
    passed = abs(ratio - 1) <= LOSS_TOLERANCE
    return Finding("first loss", passed, figures, "" if passed else loss_cause(task, model, batches, ratio))


def loss_cause(task: Task, model: nn.Module, batches: list[Batch], ratio: float) -> str:
    """Why the first loss is `ratio` times what was expected.

    Zeroed weights tell the loss from the network: they answer nothing, so only the loss's scale is left.
    """
    if not math.isfinite(ratio):
        return "the loss of the untrained network is not finite"
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    scale = mean_loss(task, model, batches) / task.first_loss
    if not math.isfinite(scale):
        scale = ratio
    sizes = {tensor.numel(): "elements of a batch" for tensor in batches[0]}
    for size, name in {**sizes, len(batches[0][0]): "rows of a batch"}.items():
        if abs(scale / size - 1) <= LOSS_TOLERANCE:
            return f"summed over the {size} {name} instead of averaged"
        if abs(scale * size - 1) <= LOSS_TOLERANCE:
            return f"divided by the {size} {name} once too often"
    if abs(scale - 1) > LOSS_TOLERANCE:
        return f"the loss's scale is off by a factor of {scale:.3g}"
    if ratio > 1:
        return "initial logits too large: the untrained network is sure of wrong answers"
    return "the untrained network knows too much: its input holds the target"


def mean_loss(task: Task, model: nn.Module, batches: list[Batch]) -> float:
    """The mean loss over these batches, in the model's mode."""
    with torch.no_grad():
        return sum(float(task.loss(model, batch)) for batch in batches) / len(batches)


def gradients(task: Task, recipe: Recipe) -> Finding:
    """Whether every parameter gets a finite gradient that is not zero, and is changed by the optimizer."""
    trainer = make_trainer(task, recipe)
    named = dict(trainer.model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in named.items()}
    seen: dict[str, set[str]] = {name: set() for name in named}
    trainer.model.train()
    for step, batch in enumerate(itertools.islice(endless(task, recipe), GRADIENT_STEPS)):
        trainer.model.zero_grad(set_to_none=True)
        trainer.loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for name, weight in named.items():
            seen[name].add(gradient_state(weight))
        trainer.train_step([batch], warmed_up(step, recipe))
    causes = []
    for name, weight in named.items():
        changed = not torch.equal(weight.detach(), before[name])
        if cause := gradient_cause(weight, seen[name], changed=changed):
            causes.append(f"{name} {cause}")
    figures = f"{len(named) - len(causes)} of {len(named)} parameters learn"
    return Finding("gradients", not causes, figures, "; ".join(causes))


def gradient_state(weight: nn.Parameter) -> str:
    """One of "none", "not finite", "zero", "good"."""
    if weight.grad is None:
        return "none"
    if not weight.grad.isfinite().all():
        return "not finite"
    return "good" if weight.grad.any() else "zero"


def gradient_cause(weight: nn.Parameter, seen: set[str], *, changed: bool) -> str:
    """Why a parameter doesn't learn, after the states of its gradient over a few steps; "" where it does."""
    if not weight.requires_grad:
        return "is frozen (requires_grad is False)"
    if "not finite" in seen:
        return "has a gradient that is not finite"
    if seen == {"none"}:
        return "is not used in the loss, or is cut off from it by detach()"
    if "good" not in seen:
        return "has a gradient of zero"
    return "" if changed else "has a gradient, but the optimizer doesn't change it"


def one_batch(task: Task, recipe: Recipe) -> Finding:
    """Whether the network can learn a few rows by heart, at the recipe's full learning rate."""
    trainer = make_trainer(task, recipe)
    batch = few_rows(next(endless(task, recipe)))
    goal = HEART_LOSS * task.first_loss
    trainer.model.train()
    lowest = math.inf
    for step in range(HEART_STEPS):
        loss = float(trainer.train_step([batch], warmed_up(step, recipe)))
        lowest = min(lowest, loss)
        if loss < goal or not math.isfinite(loss):
            break
    figures = f"loss {loss:.3g} after {step} steps on {len(batch[0])} rows, to get below {goal:.3g}"
    cause = "the network can't learn one batch by heart: "
    cause += "it diverges; lower --learning-rate" if not loss < task.first_loss else f"lowest {lowest:.3g}"
    return Finding("one batch by heart", loss < goal, figures, cause)


def few_rows(batch: Batch) -> Batch:
    """The first rows of a batch; all of it where its tensors don't share their first axis."""
    shared = len({tensor.shape[:1] for tensor in batch}) == 1
    return tuple(tensor[:HEART_ROWS] for tensor in batch) if shared else batch


def other_rows(task: Task, recipe: Recipe) -> Finding:
    """Whether a short training helps on rows that were held out.

    It must be better there than the trivial answer, and than the same training on rows that have exchanged
    their inputs: after a series' last value, the mean is better already, and needs no input.
    """
    metric, trivial = task.metric, task.trivial
    margin = CLEAR_GAIN[metric.name] * abs(trivial.validation - (1 if metric.higher_is_better else 0))
    fitted = validations(task, recipe, endless(task, recipe))
    control: Iterator[float] = itertools.repeat(trivial.validation, len(ROWS_STEPS))
    has_targets = len(next(endless(task, recipe))) > 1  # a language model's rows are their own
    if has_targets:
        control = validations(task, recipe, exchanged(endless(task, recipe)))
    for steps, value, confused in zip(ROWS_STEPS, fitted, control, strict=True):  # noqa: B007 - the last ones count
        if passed := min(metric.gain(value, trivial.validation), metric.gain(value, confused)) > margin:
            break
    name = f"validation {metric.name} {value:.4g}"
    others = f"{trivial.name} {trivial.validation:.4g}"
    others += f", with exchanged inputs {confused:.4g}" if has_targets else ""
    cause = f"one batch can be learned by heart, but {name} is not clearly better than {others}: "
    cause += "labels are shuffled against the rows, or validation reads other data"
    return Finding("labels belong to rows", passed, f"{name} after {steps} steps, {others}", cause)


def validations(task: Task, recipe: Recipe, batches: Iterator[Batch]) -> Iterator[float]:
    """The validation figure after each number of `ROWS_STEPS` of one training on these batches."""
    trainer = make_trainer(task, recipe)
    done = 0
    for steps in ROWS_STEPS:
        trainer.model.train()
        for step in range(done, steps):
            trainer.train_step([next(batches)], warmed_up(step, recipe))
        done = steps
        yield task.validate(trainer.model)


def exchanged(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each row with another row's first tensor: its input."""
    for inputs, *targets in batches:
        yield inputs.roll(1, dims=0), *targets


def make_trainer(task: Task, recipe: Recipe) -> Trainer:
    """A trainer of a copy of the network, which is never saved."""
    torch.manual_seed(recipe.seed)
    unused = Path(tempfile.gettempdir()) / "onnxedge-check-writes-nothing"
    fresh = replace(task, model=copy.deepcopy(task.model))
    return Trainer(fresh, recipe, unused, family="", device=torch.device("cpu"))


def endless(task: Task, recipe: Recipe) -> Iterator[Batch]:
    """Batches, epoch after epoch, the same ones at each call."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        yield from task.batches(generator)


def warmed_up(step: int, recipe: Recipe) -> float:
    """The recipe's learning rate after a short warm-up, without its schedule."""
    return recipe.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
