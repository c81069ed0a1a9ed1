"""The command line: `onnxedge` and `serve`, `infer`, `generate`, `health`, `providers`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from serve import __version__
from serve.process import keep_large_blocks, quiet_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = """\
usage: onnxedge COMMAND [flags]

  serve      serve a model repository over gRPC     onnxedge serve --model-repository models/
  infer      classify an image with a served model  onnxedge infer mobilenet --image boot.png
  generate   let a served model write text          onnxedge generate gpt_generate "ROMEO:"
  health     does a server, or a model, serve?      onnxedge health
  providers  what this device can run graphs on     onnxedge providers

`onnxedge COMMAND --help` lists a command's flags. Flags without a command are those of serve, as with
tritonserver.
"""
_COMMANDS = {
    "serve": "serve.transport.run",
    "infer": "serve.client",
    "generate": "serve.generate_client.command",
    "health": "serve.health_client",
    "providers": "serve.runtime.command",
}
_USAGE_ERROR = 2
_INTERRUPTED = 130  # a shell's status of a program that SIGINT ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["version"]):
        print(f"onnxedge {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if words else _USAGE_ERROR
    if words[0].startswith("-"):
        words.insert(0, "serve")
    if words[0] not in _COMMANDS:
        print(f"onnxedge: unknown command {words[0]!r}\n{_USAGE}", end="", file=sys.stderr)
        return _USAGE_ERROR
    # Imported here and not above: the allocator must be set before grpc is loaded, and a client needs no
    # onnxruntime.
    keep_large_blocks()
    quiet_grpc()
    try:
        status: int = importlib.import_module(_COMMANDS[words[0]]).main(words[1:])
    except KeyboardInterrupt:  # also while the command is imported
        return _INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
