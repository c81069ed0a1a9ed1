"""Which sequences run in the next step, and what each of them reads. No tensors, threads or clock of its own.

waiting → running → finished. Called under one lock, with the clock passed in, by `serve.generate.engine`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from serve.errors import CanceledError, DeadlineExceededError, InvalidArgumentError, UnavailableError
from serve.generate.cache_slots import CacheSlots
from serve.generate.prefix_reuse import LEAST_REUSED, Match, common_length, find_match
from serve.generate.slot_placement import SlotPlacement, room_to_copy
from serve.generate.step import Chunk, Copy, Step
from serve.generate.step_budget import StepBudget

if TYPE_CHECKING:
    from serve.errors import ServeError
    from serve.generate.sequence import Sequence
    from serve.generate.settings import GenerationSettings

# Every so many chunks, one goes to the prompt that came first, however much of it is left.
_TURNS = 4


class GenerationScheduler:
    """Continuous batching: every step sequences join and leave, and prompts are read beside the streams.

    Slots go to sequences in order of arrival, each with all the tokens that it may need: nothing that runs
    has ever to be put aside, and nothing that waits is overtaken.

    Of the prompts that are being read, the one with the least left comes first, which makes the mean time to
    the first token as short as it can be: a short prompt doesn't wait for a long one, and of equal ones the
    first is done before the second begins. Every fourth chunk goes to the one that came first, so that a long
    one gets a quarter of the work at least and ends.

    A prompt that begins as another sequence's tokens does isn't read that far but copied; if that sequence
    came earlier and has yet to read them, it is waited for, and read as if it had the other's urgency.

    With `adjacent_rows` there is never a retained slot between the lowest and the highest slot of
    `Step.decode`, so a run over that range damages none. What it writes into an idle slot in between must lie
    at the position `cached` of a sequence that reads there, or anywhere in a free slot.

    A slot may hold more than its sequence's `cached` tokens, such as those of the sequence before it: only
    the first `cached` count. `Step.released` names slots that hold nothing of use; a slot that goes from one
    sequence to the next in the same step isn't among them, nor one that the step copies from or to (it
    is in a later step's). A step that copies always runs something, too.
    """

    def __init__(self, settings: GenerationSettings, *, adjacent_rows: bool) -> None:
        """Start with an empty cache; `adjacent_rows`: decode rows must be neighbouring slots."""
        self._settings = settings
        tokens = settings.cache_tokens or settings.max_num_seqs * settings.context_length
        self._slots = CacheSlots(settings.max_num_seqs, tokens)
        self._placement = SlotPlacement(self._slots, adjacent_rows=adjacent_rows)
        self._budget = StepBudget(settings.max_num_batched_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        # Of sequences that wait for a prefix: whose (None: anybody's, in the next step), and its length.
        self._awaited: dict[Sequence, tuple[Sequence | None, int]] = {}
        self._dropped: list[tuple[Sequence, ServeError]] = []
        self._chunks = 0
        # The rows of a step that the next one is like: nobody came or went. None: something changed.
        self._steady: list[Sequence] | None = None

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def cache_usage(self) -> float:
        """Share of the cache's tokens that are reserved for running sequences, 0 to 1."""
        return self._slots.reserved / self._slots.budget

    @property
    def has_work(self) -> bool:
        """Whether `next` has anything to say, be it a slot to release."""
        return bool(self._waiting or self._running or self._dropped or self._slots.has_stale)

    def add(self, sequence: Sequence, now: float) -> None:
        """Have a sequence wait for a slot, `now` in seconds on the deadlines' clock.

        Raises:
            InvalidArgumentError: it never fits.
            UnavailableError: too many wait.
        """
        longest, context = sequence.longest, self._settings.context_length
        if longest > min(context, self._slots.budget):
            raise InvalidArgumentError(
                f"a prompt of {sequence.prompt_length} tokens and {sequence.max_tokens} to generate take "
                f"{longest} tokens of the cache, expected at most {min(context, self._slots.budget)} "
                f"(context_length {context}, {self._slots.budget} tokens in all slots): shorten the prompt "
                "or lower max_tokens"
            )
        # Those that find a free slot in the next step don't wait for one.
        bound = self._settings.max_queue_size + self._settings.max_num_seqs - len(self._running)
        if len(self._waiting) >= bound:
            self._drop_dead(now, (*self._waiting,))  # those that run may be in a step under way
            if len(self._waiting) >= bound:
                raise UnavailableError(
                    f"Exceeds maximum queue size, {len(self._waiting)} sequences wait for a slot of the "
                    f"cache (max_queue_size {self._settings.max_queue_size}): retry later"
                )
        self._waiting.append(sequence)
        self._steady = None

    def next(self, now: float) -> Step:
        """What to do now, `now` in seconds on the deadlines' clock; `ran` is to follow if it `runs`."""
        self._drop_dead(now, (*self._waiting, *self._running))
        if self._steady is not None:
            return Step(decode=self._steady.copy())
        step = Step(dropped=self._dropped)
        self._dropped = []
        self._end_waits(step)
        self._admit(step)
        step.decode = [sequence for sequence in self._running if sequence.pending == 1]
        self._placement.order_rows(step, move=not self._waiting)
        self._read(step)
        copied = {slot for copy in step.copies for slot in (copy.source, copy.target)}
        step.released = self._slots.take_released(besides=copied)
        if not (step.prefill or step.copies or self._awaited or self._slots.has_stale):
            self._steady = step.decode.copy()
        return step

    def ran(self, step: Step, seconds: float) -> None:
        """All tokens of a step have their keys and values now; it took so long."""
        if not step.copies:
            read = step.tokens - len(step.decode)
            self._budget.ran(len(step.decode), len(step.prefill), read, seconds)
        for sequence in step.decode:
            sequence.cached += 1
        for chunk in step.prefill:
            chunk.sequence.cached += chunk.count

    def finish(self, sequence: Sequence) -> None:
        """A sequence needs no more: its slot is free, or holds what it read for prompts that begin alike."""
        self._steady = None
        if sequence.slot is None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._awaited.pop(sequence, None)
        self._slots.release(sequence.slot, self._worth_keeping(sequence))
        sequence.slot = None

    def forget_prefixes(self) -> list[int]:
        """Let go of all that is retained, as after a failed run, and begin with what was reused anew.

        Returns:
            Slots whose memory is no longer needed.
        """
        self._steady = None
        for slot in list(self._slots.retained):
            self._slots.evict(slot)
        for sequence in self._running:
            if sequence.cached == sequence.reused:
                sequence.cached = sequence.reused = 0
        return self._slots.take_released()

    def check(self) -> None:
        """Raise AssertionError if the cache's slots and the sequences don't agree."""
        self._slots.check()
        live = {sequence.slot: sequence.longest for sequence in self._running}
        assert live == self._slots.live
        assert len(live) == len(self._running), "two sequences share a slot"
        assert all(sequence.slot is None for sequence in self._waiting)
        assert all(0 <= sequence.cached <= sequence.longest for sequence in self._running)
        assert self._awaited.keys() <= set(self._running)

    def _drop_dead(self, now: float, sequences: tuple[Sequence, ...]) -> None:
        """Finish those that were cancelled or are too late."""
        for sequence in sequences:
            reason = _drop_reason(sequence, now)
            if reason is not None:
                self.finish(sequence)
                self._dropped.append((sequence, reason))

    def _worth_keeping(self, sequence: Sequence) -> list[int]:
        """The tokens that a finished sequence's slot is to be retained for; none: it isn't to be."""
        if not self._settings.enable_prefix_caching or sequence.cached < LEAST_REUSED:
            return []
        ids = sequence.ids[: sequence.cached]
        for slot, prefix in list(self._slots.retained.items()):
            common = common_length(ids, prefix.ids, len(ids))
            if common == len(ids):
                return []
            if common == len(prefix.ids):
                self._slots.evict(slot)
        return ids

    def _admit(self, step: Step) -> None:
        """Give slots to those that wait, in order of arrival."""
        while self._waiting and self._slots.fits(self._waiting[0].longest):
            sequence = self._waiting.popleft()
            match = self._match(sequence)
            prefix = None if match.slot is None else self._slots.retained.get(match.slot)
            # One that the prompt has little in common with stays for others, if there is another slot.
            take_over = prefix is not None and 2 * match.tokens >= len(prefix.ids)
            sequence.slot = self._placement.place(step, sequence.longest, match.slot, take_over=take_over)
            self._running.append(sequence)
            if sequence.slot == match.slot:
                sequence.cached = sequence.reused = match.tokens
            self._share(step, sequence, match)

    def _end_waits(self, step: Step) -> None:
        """See who has the prefix now that it waited for; in order of arrival, as one may wait for another."""
        for sequence in [sequence for sequence in self._running if sequence in self._awaited]:
            awaited, tokens = self._awaited[sequence]
            if awaited is None or awaited.slot is None or awaited.cached >= tokens:
                del self._awaited[sequence]
                self._share(step, sequence, self._match(sequence))

    def _match(self, sequence: Sequence) -> Match:
        if not self._settings.enable_prefix_caching:
            return Match()
        return find_match(sequence, self._running, self._slots.retained)

    def _share(self, step: Step, sequence: Sequence, match: Match) -> None:
        """Copy the prefix that a sequence has in common with another, or have it wait for that."""
        slot, source = sequence.slot, match.slot
        if match.coming is not None:
            self._awaited[sequence] = (match.coming, match.coming_tokens)
            return
        if slot is None or source is None or match.tokens <= sequence.cached:
            return
        # The first copy for a sequence is made whatever its length.
        if match.tokens > room_to_copy(step) and any(copy.target in self._slots.live for copy in step.copies):
            self._awaited[sequence] = (None, 0)
            return
        step.copies.append(Copy(source, slot, match.tokens))
        sequence.cached = sequence.reused = match.tokens
        if source in self._slots.retained:
            self._slots.touch(source)

    def _read(self, step: Step) -> None:
        """Share the tokens that the step may read among the prompts."""
        left = self._left_to_read()
        rows, tokens = len(step.decode), 0
        while left:
            room = self._budget.room(rows, len(step.prefill), tokens)
            if room <= 0:
                return
            self._chunks += 1
            first = self._chunks % _TURNS == 0
            sequence = next(iter(left)) if first else min(left, key=left.__getitem__)
            del left[sequence]
            count = min(room, sequence.pending)
            step.prefill.append(Chunk(sequence, count))
            tokens += count

    def _left_to_read(self) -> dict[Sequence, int]:
        """Who has a prompt to read, in order of arrival, and how much is left.

        The least of what is left for it and for those that wait for it.
        """
        left = {sequence: sequence.pending for sequence in self._running if sequence.pending > 1}
        for sequence in reversed(list(left)):
            if sequence in self._awaited:
                awaited, _ = self._awaited[sequence]
                urgency = left.pop(sequence)
                if awaited in left:
                    left[awaited] = min(left[awaited], urgency)
        return left


def _drop_reason(sequence: Sequence, now: float) -> ServeError | None:
    """Why a sequence needs no other token; None where it does."""
    cancelled = sequence.call.cancelled
    if not cancelled and not sequence.call.expired(now):
        return None
    state = "waited" if sequence.slot is None else f"ran, after {sequence.generated} tokens"
    if cancelled:
        return CanceledError(f"the request was cancelled while it {state}")
    return DeadlineExceededError(f"the request's deadline passed while it {state}")
