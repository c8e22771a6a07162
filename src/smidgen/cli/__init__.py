"""The command line: each command calls one step of the process; heavy modules load inside the commands.

Exit status: 0 done, 1 our mistake, 2 the user's, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import sys

from smidgen.cli.adapters import explain, export, merge, methods
from smidgen.cli.searches import choose, compare, contrast, demo, process, refine, study
from smidgen.cli.shared import app
from smidgen.cli.steps import data, evaluate, identify, plan, predict, pretrain, train
from smidgen.errors import Interrupted, UserError

__all__ = ["app", "main"]

COMMANDS = (
    demo,
    data,
    identify,
    plan,
    train,
    pretrain,
    evaluate,
    predict,
    compare,
    choose,
    refine,
    process,
    study,
    contrast,
    merge,
    export,
    explain,
    methods,
)
"""In the order in which --help lists them."""

for _command in COMMANDS:
    app.command()(_command)


def main() -> None:
    """Run the command line; a mistake of the user's is one message and status 2, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of letters that the terminal's encoding lacks
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"smidgen: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"smidgen: {stopped}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a folder that cannot be written, a file that cannot be read
        named = f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)
        print(f"smidgen: {named}", file=sys.stderr)
        sys.exit(2)
