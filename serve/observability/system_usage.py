"""CPU and memory of the whole machine, as Triton's CPU metrics have them, from Linux's /proc."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

_LEAST_INTERVAL_SECONDS = 0.5
_IDLE, _IO_WAIT = 3, 4
# guest and guest_nice are part of user and nice already.
_COUNTED = 8


class SystemUsage:
    """Reads /proc; without it, as on macOS, all is 0."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        self._last = _cpu_times(proc)
        self._read_at = time.monotonic()
        self._utilization = 0.0

    def cpu_utilization(self) -> float:
        """Share of all cores that were busy since the last time that this was asked, 0 to 1."""
        with self._lock:
            now = time.monotonic()
            if now - self._read_at >= _LEAST_INTERVAL_SECONDS:
                busy, total = _cpu_times(self._proc)
                if total > self._last[1]:
                    self._utilization = (busy - self._last[0]) / (total - self._last[1])
                self._last, self._read_at = (busy, total), now
            return min(max(self._utilization, 0.0), 1.0)

    def memory_bytes(self) -> tuple[int, int]:
        """Total, and what is neither free nor could be freed at once."""
        amounts = {}
        with contextlib.suppress(OSError, ValueError):
            for line in (self._proc / "meminfo").read_text().splitlines():
                name, _, amount = line.partition(":")
                amounts[name] = int(amount.split()[0]) * 1024
        total = amounts.get("MemTotal", 0)
        return total, total - amounts.get("MemAvailable", total)


def _cpu_times(proc: Path) -> tuple[int, int]:
    """Busy and all clock ticks of all cores since the machine started."""
    try:
        first = (proc / "stat").read_text().split("\n", 1)[0]
        times = [int(ticks) for ticks in first.split()[1 : 1 + _COUNTED]]
        return sum(times) - times[_IDLE] - times[_IO_WAIT], sum(times)
    except (OSError, ValueError, IndexError):
        return 0, 0
