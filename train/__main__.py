"""The command line of training.

python -m train FAMILY [flags]           train; the flags are the fields of the family's recipe
python -m train check FAMILY [flags]     is the network fit to be trained? seconds, before hours
python -m train search FAMILY [flags]    train with several values of recipe fields, and compare
python -m train sample CHECKPOINT        let a trained GPT write
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import TYPE_CHECKING

from train.checkpoint import CheckpointError
from train.data.download import DataError
from train.device import leave_one_cpu_free
from train.family import FAMILIES
from train.flags import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Sequence

# Command to the module with its `main`; any other first word is a family.
COMMANDS = {"check": "train.check", "search": "train.search", "sample": "train.sampling"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as the arguments say.

    Returns:
        The exit code: 0, 1 for a failure that the message explains, 130 after Ctrl-C. Wrong arguments exit
        with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    module = COMMANDS.get(words[0]) if words else None
    if module is None:
        require_family(words)
        module = "train.run"
    leave_one_cpu_free()
    try:
        code: int = importlib.import_module(module).main(words if module == "train.run" else words[1:])
    except (CheckpointError, DataError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def require_family(words: Sequence[str]) -> None:
    """Exit with the usage unless the first word is a family."""
    commands = (__doc__ or "").partition("\n\n")[2]
    usage = f"usage: python -m train FAMILY [flags]\n\n{commands}\nfamilies: {', '.join(FAMILIES)}"
    name = words[0] if words else ""
    if name in FAMILIES:
        return
    if name in ("-h", "--help"):
        print(usage)
        raise SystemExit(0)
    near = difflib.get_close_matches(name, (*FAMILIES, *COMMANDS), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"{usage}\nerror: {name or 'nothing'} given as the family{hint}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
