"""Two servers behind a stock proxy, restarted in turn under load: how many requests fail?

python -m tests.deploy.rolling_restarts [--balancer nginx] [--restarts 20] [--without-policy]

The servers and the proxy are hosts of their own (network namespaces, which need root; else addresses of the
loopback), the proxy runs on its file in deploy/proxy/, and the clients are tritonclient's with
deploy/proxy/retry_policy.json. `client` is no proxy: the clients divide their requests themselves, by
deploy/proxy/round_robin.json. The exit status is 0 when no request failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.hosts import hosts, isolated, run_isolated, why_not
from tests.deploy.proxies import CONFIGS, PROXIES, ROOT, environment
from tests.graphs import identity, slow, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.hosts import Host
    from tests.deploy.proxies import Proxy

SERVERS = ("onnxedge-1", "onnxedge-2")
PORT, PROXY_PORT = 8001, 8000
CLIENTS = 8
# A closed loop with pauses, so that two cores serve it with time to spare: some 400 requests per second.
PAUSE_SECONDS = 0.012
MULTIPLICATION_SECONDS = 1e-4
REQUEST_SECONDS = 30
START_SECONDS = 30
EXIT_SECONDS = 20
# How long a server must be ready before the next one is restarted, as a Deployment's minReadySeconds: health
# checks that come once a second have seen it then.
SETTLE_SECONDS = 1.5
CLIENT_SIDE = "client"


class Program:
    """A process on a host of its own; what it says goes to a file."""

    def __init__(self, host: Host, command: list[str], log: Path) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*host.command, *command], cwd=ROOT, stdout=output, stderr=output, env=environment()
            )

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(EXIT_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Server:
    """`onnxedge serve` on a host; started again, it has the same address."""

    def __init__(self, host: Host, models: Path, log: Path) -> None:
        flags = (f"--model-repository={models}", f"--grpc-address={host.address}", f"--grpc-port={PORT}")
        more = ("--allow-metrics=false", f"--exit-timeout-secs={EXIT_SECONDS}")
        self._command = [sys.executable, "-m", "serve", "serve", *flags, *more]
        self._host, self._log = host, log
        self.url = f"{host.address}:{PORT}"
        self.program = self._start()

    def _start(self) -> Program:
        program = Program(self._host, self._command, self._log)
        wait_until_serving(self.url)
        return program

    def stop(self) -> int:
        """Drain it; its exit status."""
        return self.program.stop()

    def restart(self) -> int:
        """The old process's exit status, when the new one is ready."""
        status = self.stop()
        self.program = self._start()
        return status


def wait_until_serving(url: str) -> None:
    """Return when health says SERVING.

    Raises:
        TimeoutError: it doesn't, for long.
    """
    check = health_pb2.HealthCheckRequest()
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            with contextlib.suppress(grpc.RpcError):
                if stub.Check(check, timeout=2).status == health_pb2.HealthCheckResponse.SERVING:
                    return
        time.sleep(0.05)
    raise TimeoutError(f"{url} is not ready after {START_SECONDS} s")


@dataclass
class Outcome:
    """What became of the requests, under one balancer."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    statuses: list[int] = field(default_factory=list)
    """Of the servers that were stopped."""

    def row(self, name: str) -> str:
        """A line of the table."""
        p50, p99 = np.percentile(self.seconds, (50, 99)) * 1e3
        failed, requests = self.failures.total(), len(self.seconds) + self.failures.total()
        return (
            f"{name:<22}{requests:>9}{len(self.statuses):>9}{failed:>8}{p50:>9.2f}{p99:>9.2f}"
            f"{max(self.seconds) * 1e3:>9.0f}"
        )

    def passed(self) -> bool:
        """No request failed, and each server said that it answered all it had."""
        return not self.failures and not any(self.statuses)


HEADER = f"{'balancer':<22}{'requests':>9}{'restarts':>9}{'failed':>8}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}"


class Load:
    """Clients that ask, check the answer, pause, and ask again."""

    def __init__(self, url: str, options: list[tuple[str, Any]]) -> None:
        self.outcome = Outcome()
        self._url, self._options = url, options
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Outcome:
        """End after the requests that are under way."""
        self._ended.set()
        for thread in self._threads:
            thread.join(REQUEST_SECONDS + 10)
            if thread.is_alive():
                self.outcome.failures["neither answered nor refused"] += 1
        return self.outcome

    def _run(self, number: int) -> None:
        dice = random.Random(number)  # noqa: S311 - not a secret
        client = triton.InferenceServerClient(self._url, channel_args=self._options)
        for turn in itertools.count(number):
            if self._ended.is_set():
                break
            started = time.perf_counter()
            try:
                _ask(client, turn)
            except (triton.InferenceServerException, AssertionError) as error:
                with self._lock:
                    waited = time.perf_counter() - started
                    self.outcome.failures[f"{error} (request {turn % 8}, after {waited:.1f} s)"] += 1
            else:
                with self._lock:
                    self.outcome.seconds.append(time.perf_counter() - started)
            time.sleep(dice.expovariate(1 / PAUSE_SECONDS))
        client.close()


# Small and large messages, short and long runs (0.1 to 20 ms).
_ROWS = {0: 4, 4: 150_000}
_MULTIPLICATIONS = {1: 1, 2: 10, 3: 50, 5: 1, 6: 10, 7: 200}


def _ask(client: Any, turn: int) -> None:
    kind = turn % 8
    if kind in _ROWS:
        x = np.full((1, _ROWS[kind]), turn, np.float32)
        answer = client.infer("echo", [_tensor("x", x, "FP32")], client_timeout=REQUEST_SECONDS)
        assert np.array_equal(answer.as_numpy("y"), x), "another answer"
    else:
        n = np.array(_MULTIPLICATIONS[kind], np.int64)
        client.infer("slow", [_tensor("n", n, "INT64")], client_timeout=REQUEST_SECONDS)


def _tensor(name: str, value: Any, datatype: str) -> Any:
    tensor = triton.InferInput(name, value.shape, datatype)
    tensor.set_data_from_numpy(value)
    return tensor


def channel_options(name: str, *, policy: bool) -> list[tuple[str, Any]]:
    """The published policy as options of a channel, which has a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    # gRPC keeps a request for another attempt up to this size: 256 KiB by default, less than a picture.
    own.append(("grpc.per_rpc_retry_buffer_size", 16 << 20))
    if name == CLIENT_SIDE:
        # A server that comes back is tried within half a second, not by gRPC's 1, 1.6, 2.6, ... up to 120.
        own += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
    config = json.loads(
        (CONFIGS / ("round_robin.json" if name == CLIENT_SIDE else "retry_policy.json")).read_text()
    )
    if not policy:
        del config["methodConfig"]
    return [*own, ("grpc.service_config", json.dumps(config))]


@contextlib.contextmanager
def balanced(proxy: Proxy | None, places: dict[str, Host], folder: Path) -> Iterator[str]:
    """What the clients connect to."""
    if proxy is None:
        yield "ipv4:" + ",".join(f"{places[name].address}:{PORT}" for name in SERVERS)
        return
    host = places["proxy"]
    config = proxy.configure({name: places[name].address for name in SERVERS}, folder)
    program = Program(host, proxy.command(proxy.arguments, config), folder / "log")
    try:
        wait_until_serving(f"{host.address}:{PROXY_PORT}")
        yield f"{host.address}:{PROXY_PORT}"
    finally:
        program.stop()


def restart_in_turn(servers: list[Server], load: Load, count: int, drain_seconds: float) -> Outcome:
    """Restart one server after the other while the load goes on."""
    time.sleep(SETTLE_SECONDS)
    for server in itertools.islice(itertools.cycle(servers), count):
        with occupied(server, drain_seconds, load.outcome.failures):
            load.outcome.statuses.append(server.restart())
        time.sleep(SETTLE_SECONDS)
    return load.stop()


@contextlib.contextmanager
def occupied(server: Server, seconds: float, failures: Counter[str]) -> Iterator[None]:
    """Have the server run a request of about so long, which a drain has to wait for."""
    client = triton.InferenceServerClient(server.url, channel_args=[("grpc.enable_retries", 0)])
    n = np.array(int(seconds / MULTIPLICATION_SECONDS), np.int64)
    answered = threading.Event()

    def note(result: Any, error: Any) -> None:  # noqa: ARG001 - tritonclient names it
        if error is not None:
            failures[f"{error} (the long request)"] += 1
        answered.set()

    if seconds:
        client.async_infer("slow", [_tensor("n", n, "INT64")], note, client_timeout=EXIT_SECONDS)
        time.sleep(0.1)
    yield
    if seconds and not answered.wait(EXIT_SECONDS):
        failures["the long request was neither answered nor refused"] += 1
    client.close()


def run(names: list[str], restarts: int, drain_seconds: float, *, policy: bool) -> bool:
    """Each balancer in turn, on the same servers; whether no request failed."""
    places = hosts((*SERVERS, "proxy"))
    proxies = {proxy.name: proxy for proxy in PROXIES}
    passed = True
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        write_model(folder / "models" / "slow", slow())
        write_model(folder / "models" / "echo", identity(["n", "m"]))
        servers = []
        for name in SERVERS:
            servers.append(Server(places[name], folder / "models", folder / f"{name}.log"))
            stack.callback(servers[-1].stop)
        print(HEADER, flush=True)
        for name in names:
            own = folder / name
            own.mkdir(exist_ok=True)
            with balanced(proxies.get(name), places, own) as url:
                load = Load(url, channel_options(name, policy=policy))
                outcome = restart_in_turn(servers, load, restarts, drain_seconds)
            print(outcome.row(name), flush=True)
            for message, count in outcome.failures.most_common(8):
                print(f"    {count} times: {message}")
            if any(outcome.statuses):
                print(f"    exit statuses {outcome.statuses}")
                for name_of_server in SERVERS:
                    print((folder / f"{name_of_server}.log").read_text()[-4000:])
            passed &= outcome.passed()
    return passed


def main() -> int:
    """Run on hosts of their own, where this machine can have some."""
    choices = [proxy.name for proxy in PROXIES] + [CLIENT_SIDE]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--balancer", action="append", choices=choices, help="default: all that are here")
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument(
        "--drain-seconds", type=float, default=0.0, help="that each server needs for its last request"
    )
    parser.add_argument("--without-policy", action="store_true", help="for comparison: clients don't retry")
    arguments = parser.parse_args()
    status = run_isolated("tests.deploy.rolling_restarts", sys.argv[1:])
    if status is not None:
        return status
    if not isolated() and (reason := why_not()):
        print(f"all on the loopback, no hosts of their own: {reason}")
    missing = [proxy.name for proxy in PROXIES if proxy.path() is None]
    if missing:
        print(f"not here: {', '.join(missing)} (python -m tests.deploy.proxies runs/proxies)")
    names = arguments.balancer or [name for name in choices if name not in missing]
    passed = run(names, arguments.restarts, arguments.drain_seconds, policy=not arguments.without_policy)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
