"""Poll mode: follow the repository folders."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import ModelLoadError
from serve.model_repository.model_folder import model_folders, model_names, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from serve.model_repository.model_folder import Stamp

logger = logging.getLogger(__name__)

Look = dict[str, tuple["Stamp | None", ...]]
"""Model name to what each of its folders held; None for one that can't be looked at."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What to do, by model name: `load` what is new or has changed, `unload` what is gone."""

    load: tuple[str, ...]
    unload: tuple[str, ...]


def changes(served: Mapping[str, object], before: Mapping[str, object], now: Mapping[str, object]) -> Changes:
    """What to do about the repository, from two looks at it.

    A model is touched only when both looks saw the same of it: what is still being written differs, and what
    is being replaced may be away for a moment.

    Args:
        served: what each model's folder held when it was last loaded, whether that succeeded or not.
        before: the look before this one.
        now: this look.
    """
    load = (name for name, found in now.items() if before.get(name) == found != served.get(name))
    unload = served.keys() - before.keys() - now.keys()
    return Changes(tuple(sorted(load)), tuple(sorted(unload)))


def look(roots: Sequence[Path]) -> Look:
    """What the repository folders hold now.

    Raises:
        OSError: a repository folder can't be read: nothing can be said of its models.
    """
    names = sorted(set().union(*(model_names(root) for root in roots)))
    return {name: tuple(_stamp(folder) for folder in model_folders(roots, name)) for name in names}


def _stamp(folder: Path) -> Stamp | None:
    try:
        return stamp(folder)
    except (OSError, ModelLoadError):
        return None


class Poller:
    """Looks at the repository again and again on a thread of its own."""

    def __init__(
        self,
        roots: Sequence[Path],
        seconds: float,
        load: Callable[[str], None],
        unload: Callable[[str], None],
    ) -> None:
        """Take what the folders hold now for what is served.

        Args:
            roots: the repository folders.
            seconds: between two looks.
            load: loads a model, or loads it again; raises nothing.
            unload: unloads one; raises nothing.
        """
        self._roots = roots
        self._seconds = seconds
        self._load = load
        self._unload = unload
        self._served = self._before = look(roots)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="repository-poll", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Look no more; wait up to `seconds` for a load that is under way."""
        self._stopping.set()
        self._thread.join(seconds)

    def _work(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                now = look(self._roots)
            except OSError as error:
                logger.warning("the model repository can't be read, models stay as they are: %s", error)
                continue
            todo = changes(self._served, self._before, now)
            self._before = now
            # Before the load: what changes while it reads is seen by the next look.
            self._served = {
                name: now[name] if name in todo.load else found
                for name, found in ({**dict.fromkeys(todo.load, ()), **self._served}).items()
                if name not in todo.unload
            }
            for name in todo.unload:
                self._unload(name)
            for name in todo.load:
                self._load(name)
