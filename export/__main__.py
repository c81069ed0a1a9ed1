"""The command line of the exporter.

python -m export SOURCE --to models      a checkpoint, or module:function, becomes a model-repository entry
python -m export compare A B             two graphs side by side: size, speed, what they answer
python -m export inspect model.onnx      what a graph is made of, and what a run of it costs
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Command to the module with its `main`; any other first word is a source.
COMMANDS = {"compare": "export.inspection.compare", "inspect": "export.inspection.inspect"}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as the arguments say.

    Returns:
        The exit code: 0, 1 for a failure that the message explains, 130 after Ctrl-C. Wrong arguments exit
        with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    module = COMMANDS.get(words[0]) if words else None
    try:
        code: int = importlib.import_module(module or "export.run").main(words[1:] if module else words)
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
