"""The threads that run graphs: a pool for each session, or one that all sessions share."""

from __future__ import annotations

import logging
import threading
from typing import Any

import onnxruntime as ort

logger = logging.getLogger(__name__)

_STARTING = threading.Lock()
_SHARED = threading.Event()


def set_threads(options: Any, intra_op_threads: int, inter_op_threads: int, *, shared: bool = False) -> None:
    """Give a session its threads.

    Once there is a shared pool onnxruntime takes no session with one of its own, so all get the shared one.

    Args:
        options: onnxruntime.SessionOptions.
        intra_op_threads: within a node; of the whole process if it is this call that starts the shared pool.
        inter_op_threads: across branches, likewise.
        shared: use the shared pool.
    """
    with _STARTING:
        if shared and not _SHARED.is_set():
            _start(intra_op_threads, inter_op_threads)
    if _SHARED.is_set():
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = inter_op_threads


def _start(intra_op_threads: int, inter_op_threads: int) -> None:
    ort.set_global_thread_pool_sizes(intra_op_threads, inter_op_threads)
    _SHARED.set()
    if intra_op_threads > 1:
        # Measured: two threads, a run of 1 ms every 10 ms, take 1.0 cores; pools per session 0.06.
        logger.warning(
            "enable-global-threadpool: onnxruntime's shared pool spins while it waits, and its Python "
            "interface can't stop that; a pool per model, the default, doesn't"
        )
