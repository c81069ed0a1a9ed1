"""A graph loaded and run in a process of its own, which it may hang or end without harm to the server.

A hostile or damaged graph can keep onnxruntime busy for ever (a Loop) or end the process (operators that
abort on shapes they don't expect): 35 hangs and 4 aborts in 60 000 mutated graphs. So a graph that nobody
vouches for is tried here first: a fresh interpreter, with limits on its memory, processor time, files and
time, loads it and runs it once.

    python -I -c "... from serve.loading.isolation import main ..."     what `probe` starts
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.errors import ModelLoadError, ServeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve.pb import model_config_pb2 as pb
    from serve.runtime.session import Session, SessionSettings

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; from serve.loading.isolation import main; sys.exit(main())"
)
_ROOT = str(Path(__file__).resolve().parents[2])
_MEBIBYTE = 1 << 20
_MAX_ANSWER_BYTES = 1 << 16
_MAX_FILES = 256  # a graph may have a side file for each tensor
_REFUSED = 3  # exit status; any other but 0 is not ours
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate", "cannot allocate memory")


@dataclass(frozen=True, slots=True)
class ProbeLimits:
    """What the process may take.

    Attributes:
        memory_bytes: of memory, that of Python and onnxruntime (about 50 MB) included.
        cpu_seconds: of processor time, all threads together; whole seconds.
        seconds: of wall clock.
    """

    memory_bytes: int
    cpu_seconds: int
    seconds: float


def probe(
    path: Path, settings: SessionSettings, limits: ProbeLimits, config: pb.ModelConfig | None = None
) -> None:
    """Load a graph on the CPU in a process of its own, run it once on zeros, and warm it up.

    That zeros make no sense to the graph, so that its run fails as runs fail, is no reason to refuse it; nor
    is what the golden samples or the warm-up find wrong, which the server finds, too.

    Args:
        path: the graph's, in its version folder.
        settings: as the server would load it with; providers other than the CPU's are left out, since drivers
            need more than a closed-off process has.
        limits: what it may take.
        config: of the model, as the server would warm it up with; None: without a warm-up.

    Raises:
        ModelLoadError: it can't be loaded, takes more than the limits, or ends the process.
    """
    message = None if config is None else config.SerializeToString()
    task = pickle.dumps((path.absolute(), settings.on_cpu(), limits, message))
    # Everything of this interpreter's own path but what stands for the current folder, which is the graph's.
    modules = [folder for folder in sys.path if Path(folder).is_absolute()]
    if _ROOT not in modules:
        modules.insert(0, _ROOT)
    process = subprocess.Popen(  # noqa: S603 - this interpreter, a program of ours
        [sys.executable, "-I", "-c", _PROGRAM, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=path.parent,
        env=_environment(),
        start_new_session=True,
    )
    try:
        answer = _exchange(process, task, limits)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    _judge(status, answer, limits)


def _environment() -> dict[str, str]:
    """Nothing of the server's but where its libraries are: a graph has no business with the rest."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    # One arena and one thread for numpy's libraries: each would reserve address space, which is limited.
    return {
        **kept,
        "ORT_DISABLE_TELEMETRY": "1",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _exchange(process: subprocess.Popen[bytes], task: bytes, limits: ProbeLimits) -> bytes:
    """Give the process its task and read what it says until it ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    answer = b""
    with process.stdin as stdin, contextlib.suppress(BrokenPipeError):
        stdin.write(task)
    with process.stdout as stdout, selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while len(answer) < _MAX_ANSWER_BYTES:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise _refusal(f"took longer than {limits.seconds:g} s", "--untrusted-timeout-secs")
            part = os.read(stdout.fileno(), _MAX_ANSWER_BYTES)
            if not part:
                break
            answer += part
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise _refusal(f"took longer than {limits.seconds:g} s", "--untrusted-timeout-secs") from None
    return answer


def _judge(status: int, answer: bytes, limits: ProbeLimits) -> None:
    """Raise what the end of the process means."""
    if status == 0:
        return
    if status == -signal.SIGXCPU:
        raise _refusal(
            f"took longer than {limits.cpu_seconds} s of processor time", "--untrusted-timeout-secs"
        )
    if status < 0:
        raise _refusal(f"ended the process (signal {-status}, {signal.Signals(-status).name})")
    said = _last_line(answer)
    if status != _REFUSED or "problem" not in said:
        text = answer.decode(errors="replace").strip().splitlines()
        raise _refusal(f"ended the process (status {status}): {text[-1] if text else 'it said nothing'}")
    if said["problem"] == "memory":
        raise _refusal(f"used more than {limits.memory_bytes // _MEBIBYTE} MB", "--untrusted-memory-mb")
    raise ModelLoadError(str(said.get("message")))


def _refusal(what: str, flag: str = "") -> ModelLoadError:
    advice = f"; where it is known to be good, raise {flag}" if flag else ""
    return ModelLoadError(f"the graph, tried in a process of its own, {what}{advice}")


def _last_line(answer: bytes) -> Mapping[str, Any]:
    """What the process said last, if it is a JSON object."""
    lines = answer.strip().splitlines()
    try:
        said = json.loads(lines[-1]) if lines else {}
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def main() -> int:
    """The process: read a task from standard input, try the graph; 0, or 3 with a JSON line on the reason."""
    path, settings, limits, config = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the server, see `probe`
    from serve.runtime import session  # noqa: F401, PLC0415 - onnxruntime comes in before memory is limited

    _limit(limits)
    try:
        _try(path, settings, config)
    except MemoryError:
        said = {"problem": "memory"}
    except ModelLoadError as error:
        said = (
            {"problem": "memory"} if _is_out_of_memory(error) else {"problem": "load", "message": str(error)}
        )
    else:
        return 0
    print(json.dumps(said), flush=True)
    return _REFUSED


def _limit(limits: ProbeLimits) -> None:
    """Bind this process to its limits.

    Address space is what the kernel can limit. What Python and onnxruntime have reserved without using it,
    for stacks and libraries, is added, so that the limit means memory.
    """
    with Path("/proc/self/statm").open() as stream:
        reserved, used = (int(pages) * resource.getpagesize() for pages in stream.read().split()[:2])
    for name, soft, hard in (
        (resource.RLIMIT_AS, address_space := limits.memory_bytes + reserved - used, address_space),
        (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, _MAX_FILES, _MAX_FILES),
    ):
        ceiling = resource.getrlimit(name)[1]
        if ceiling == resource.RLIM_INFINITY:
            ceiling = hard
        resource.setrlimit(name, (min(soft, ceiling), min(hard, ceiling)))


def _try(path: Path, settings: SessionSettings, config: bytes | None) -> None:
    """Load the graph, run it once, and do what the server does with it before its first request.

    Raises:
        ModelLoadError: it can't be loaded.
        MemoryError: it needs more than there is.
    """
    from serve.loading.samples import make_inputs  # noqa: PLC0415 - see `main`
    from serve.runtime.session import Session  # noqa: PLC0415 - likewise

    session = _Watched(Session(path, settings))
    with contextlib.suppress(ModelLoadError, ServeError):
        session.run(make_inputs(session.inputs), [output.name for output in session.outputs])
    if config is not None:
        try:
            _warm_up(session, path, config)
        except (ModelLoadError, ServeError) as error:
            session.ran_out_of_memory |= _is_out_of_memory(error)
    if session.ran_out_of_memory:
        raise MemoryError


class _Watched:
    """A session that remembers whether a run failed for lack of memory, whatever its caller makes of that."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.ran_out_of_memory = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Any:
        """As the session's."""
        try:
            return self._session.run(inputs, outputs)
        except ServeError as error:
            self.ran_out_of_memory |= _is_out_of_memory(error)
            raise


def _warm_up(session: Any, path: Path, serialized: bytes) -> None:
    """Check the golden samples and warm the graph up."""
    from serve.generate.generation_config import is_generation  # noqa: PLC0415 - see `main`
    from serve.loading import golden  # noqa: PLC0415 - likewise
    from serve.loading.generation import try_generation  # noqa: PLC0415 - likewise
    from serve.loading.warmup import warm_up  # noqa: PLC0415 - likewise
    from serve.model.model_config import resolve  # noqa: PLC0415 - likewise
    from serve.pb import model_config_pb2  # noqa: PLC0415 - likewise

    folder = path.parent.parent
    message = model_config_pb2.ModelConfig.FromString(serialized)
    if is_generation(message):
        try_generation(message, session, path)
        return
    config = resolve(message, folder.name, session.inputs, session.outputs, {})
    golden.check(session, config, path.parent, path.name)
    warm_up(session, config, folder, path.parent)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what an error comes from; onnxruntime has no class for it."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False
