"""The command line of a script: options by tyro, errors in one line, an exit status."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import absl.logging
import data
import run_folder
import tyro
from options import SettingsError

# What a user can mend; all else is a defect, and shows where it came from.
ERRORS = (SettingsError, data.DataError, run_folder.RunFolderError)


def parse(settings: Callable[..., Any], description: str | None, argv: Sequence[str]) -> Any:
    """The settings of a command line; leaves with status 2 where it is wrong."""
    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax reports each file that it touches
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(settings, args=list(argv), description=description, config=config)


def run(
    function: Callable[[Any], int | None],
    settings: Callable[..., Any],
    description: str | None,
    argv: Sequence[str] | None,
    stopped: str = "Stopped.",
) -> int:
    """Calls the function with the settings of a command line; returns the exit status.

    `stopped`: what is said where Ctrl-C ends it.
    """
    given = parse(settings, description, sys.argv[1:] if argv is None else argv)
    try:
        return function(given) or 0
    except ERRORS as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
