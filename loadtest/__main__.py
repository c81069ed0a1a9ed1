"""Latency and throughput of models on any server that speaks the Open Inference Protocol.

python -m loadtest --model mobilenet --rate 200     an open loop: requests come when they come
python -m loadtest --model mobilenet --users 8      a closed loop
python -m loadtest search --model mobilenet --target 'p99<20ms'
python -m loadtest suite loadtest/targets.toml      several runs, and a verdict
python -m loadtest compare before.json after.json
python -m loadtest report result.json --html result.html
python -m loadtest selfcheck                        what this client can measure on this machine
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

# A refused handshake is reported with its reason; gRPC's own log would say it again, between the lines of a
# report.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_COMMANDS = ("run", "search", "suite", "compare", "report", "selfcheck")


def main(arguments: list[str]) -> int:
    """Run a command; the exit status: 0 passed, 1 failed, 2 asked wrongly, 3 the run can't be believed."""
    command = "run"
    if arguments and arguments[0] in _COMMANDS:
        command, arguments = arguments[0], arguments[1:]
    elif arguments and not arguments[0].startswith("-"):
        print(
            f"loadtest: unknown command '{arguments[0]}', expected one of {', '.join(_COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    # One at a time: no command should wait for another's imports.
    module = import_module(f"loadtest.commands.{command}")
    status: int = module.main(arguments)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
