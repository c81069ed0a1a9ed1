"""Which scheduler a model gets: by its config, and by what its warm-up found."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.scheduling.batcher import BatcherSettings, DynamicBatcher
from serve.scheduling.scheduler import DefaultScheduler
from serve.scheduling.sequence import SequenceScheduler
from serve.scheduling.sequence_config import SequenceSettings

if TYPE_CHECKING:
    from serve.loading.warmup import WarmUp
    from serve.model.model_config import ModelConfig
    from serve.pb import model_config_pb2 as pb
    from serve.scheduling.scheduler import Scheduler
    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

# What grpcio costs a request, whatever runs behind it.
_TRANSPORT_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model version's requests are scheduled.

    Attributes:
        scheduler: decides what runs next.
        shares_runs: whether it may give out several requests at once.
        reason: why it was chosen, in a few words.
    """

    scheduler: Scheduler
    shares_runs: bool
    reason: str


def choose_scheduler(
    config: ModelConfig, instances: int, settings: ServerSettings, warm_up: WarmUp
) -> Choice:
    """The scheduler of a model version.

    Where `dynamic_batching` is missing it is completed, as in Triton, unless --disable-auto-complete-config.
    Batches grow to the size that pays; preferred sizes or a queue delay in the config are taken as they are.

    Raises:
        ModelLoadError: the config's figures don't fit together.
    """
    message = config.message
    choice = message.WhichOneof("scheduling_choice")
    if choice == "sequence_batching":
        sequences = SequenceSettings.from_config(
            message.sequence_batching, config.max_batch_size, instances, settings.max_live_sequences
        )
        reason = f"sequences, {message.sequence_batching.WhichOneof('strategy_choice') or 'direct'}"
        return Choice(SequenceScheduler(sequences), config.max_batch_size > 1, reason)
    batching = message.dynamic_batching
    insists = bool(batching.preferred_batch_size or batching.max_queue_delay_microseconds)
    useful = config.max_batch_size if insists else warm_up.useful_batch_size
    if insists and not warm_up.rows_independent:
        logger.warning(
            "'%s': dynamic_batching makes batches although a row's answer depends on the others: %s",
            config.name,
            warm_up.reason,
        )
    if choice is None and (settings.disable_auto_complete_config or useful <= 1):
        return Choice(DefaultScheduler(), shares_runs=False, reason=_why_not(config, settings, warm_up))
    batcher = DynamicBatcher(BatcherSettings.from_config(batching, config.max_batch_size), max(1, useful))
    if useful <= 1:
        return Choice(batcher, shares_runs=False, reason=_why_not(config, settings, warm_up))
    reason = f"up to {useful} rows" + (" (by config)" if insists else "")
    return Choice(batcher, shares_runs=True, reason=reason)


def _why_not(config: ModelConfig, settings: ServerSettings, warm_up: WarmUp) -> str:
    if config.max_batch_size <= 1:
        return f"off: max_batch_size is {config.max_batch_size}"
    if settings.disable_auto_complete_config and not config.message.HasField("dynamic_batching"):
        return "off: the config has no dynamic_batching"
    if not warm_up.rows_independent:
        return f"off: rows depend on each other: {warm_up.reason}"
    return f"off: {warm_up.reason or 'it does not pay'}"


def choose_instances(message: pb.ModelConfig, default: int, warm_up: WarmUp) -> int:
    """How many runs may go on at once; what the config says, or `default`.

    Where batches pay and a row of one costs less than the transport takes to carry it, one instance: a second
    one would only take half of the batches' rows, and the core that decodes them. On one core with 32 clients
    of an LSTM: 5.9 rows a run with one, 2.5 with two.
    """
    if any(group.count for group in message.instance_group):
        return default
    row_seconds = warm_up.figures.get(warm_up.useful_batch_size)
    pays = warm_up.useful_batch_size > 1 and row_seconds is not None and row_seconds < _TRANSPORT_SECONDS
    return 1 if pays else default


def complete_scheduling(message: pb.ModelConfig, scheduler: Scheduler) -> None:
    """Put what was chosen into the config that clients can read, with Triton's defaults."""
    if isinstance(scheduler, DynamicBatcher):
        message.dynamic_batching.SetInParent()
        if message.max_batch_size and not message.dynamic_batching.preferred_batch_size:
            message.dynamic_batching.preferred_batch_size.append(message.max_batch_size)
    oldest = message.sequence_batching.HasField("oldest")
    if oldest and message.max_batch_size and not message.sequence_batching.oldest.preferred_batch_size:
        message.sequence_batching.oldest.preferred_batch_size.append(message.max_batch_size)
