"""The states of a model and its versions, and how they follow each other. No threads, no disk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from serve.model.served_version import ServedVersion

READY = "READY"
LOADING = "LOADING"
UNLOADING = "UNLOADING"
UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class ModelState:
    """One line of the repository index, in Triton's words.

    Attributes:
        name: the model's.
        version: "" where no version is known.
        state: READY, LOADING, UNLOADING or UNAVAILABLE; "" for a model that was never loaded.
        reason: why it isn't ready, or why its last reload failed.
    """

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the repository at one moment; a change makes a new one, so that readers need no lock.

    Attributes:
        name: its name.
        versions: those that answer requests.
        problems: version to the reason why the last load of it failed; None for the model as a whole.
        changing: versions on the way, LOADING or UNLOADING; one that is loaded anew answers meanwhile and is
            in `versions`, too.
        unloaded: versions that answered once.
        contents: version to what it was made from; a version of equal contents needn't be loaded again.
    """

    name: str
    versions: Mapping[int, ServedVersion] = field(default_factory=dict)
    problems: Mapping[int | None, str] = field(default_factory=dict)
    changing: Mapping[int, str] = field(default_factory=dict)
    unloaded: frozenset[int] = frozenset()
    contents: Mapping[int, Hashable] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether what should be there answers; what was unloaded should not be there.

        After a reload that failed the earlier versions answer on: the model is ready.
        """
        return bool(self.versions) or not (self.problems or self.changing)

    @property
    def states(self) -> list[ModelState]:
        """Each version's state, by number; problems of the model as a whole first."""
        whole = self.problems.get(None, "")
        states = [ModelState(self.name, "", UNAVAILABLE, whole)] if whole and not self.versions else []
        numbers = {*self.versions, *self.changing, *self.unloaded, *(n for n in self.problems if n)}
        return states + [self._state(number, whole) for number in sorted(numbers)]

    def _state(self, number: int, whole: str) -> ModelState:
        reason = self.problems.get(number, "")
        if number in self.versions:
            return ModelState(self.name, str(number), READY, reason or whole)
        if number in self.changing:
            return ModelState(self.name, str(number), self.changing[number])
        return ModelState(self.name, str(number), UNAVAILABLE, reason or "unloaded")

    def loading(self, numbers: Iterable[int]) -> Model:
        """These versions are being loaded; what answers goes on."""
        return replace(self, changing={**self.changing, **dict.fromkeys(numbers, LOADING)})

    def failed(self, problems: Mapping[int | None, str]) -> Model:
        """The load failed; what answered before goes on."""
        return replace(self, problems=problems, changing=_only(UNLOADING, self.changing))

    def loaded(self, versions: Mapping[int, ServedVersion], contents: Mapping[int, Hashable]) -> Model:
        """The load is done: these versions answer now, and the others go."""
        gone = dict.fromkeys(self.versions.keys() - versions.keys(), UNLOADING)
        still = _only(UNLOADING, self.changing)
        changing = {number: state for number, state in (still | gone).items() if number not in versions}
        unloaded = self.unloaded - versions.keys()
        return Model(self.name, versions, changing=changing, unloaded=unloaded, contents=contents)

    def unloading(self) -> Model:
        """All versions go; nothing answers from now on."""
        failed = {number for number in self.problems if number} - self.versions.keys()
        changing = _only(UNLOADING, self.changing) | dict.fromkeys(self.versions, UNLOADING)
        return Model(self.name, changing=changing, unloaded=self.unloaded | failed)

    def gone(self, numbers: Iterable[int]) -> Model:
        """These versions, or what they were before a reload, have answered their last request."""
        ended = {number for number in numbers if self.changing.get(number) == UNLOADING}
        changing = {number: state for number, state in self.changing.items() if number not in ended}
        return replace(self, changing=changing, unloaded=self.unloaded | ended)


def _only(wanted: str, changing: Mapping[int, str]) -> dict[int, str]:
    return {number: state for number, state in changing.items() if state == wanted}
