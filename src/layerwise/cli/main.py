"""Read a command line, do it, and turn what went wrong into a message and a status."""

import json
import sys
import traceback
from collections.abc import Sequence

from layerwise.cli.parser import build
from layerwise.core.errors import UserError

# Commands that go on where they stopped.
_RESUMED = ("compress", "federate", "merge", "run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it is done, 2 when the user made a mistake, 1 when we did.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        return _do(given)
    except UserError as error:
        return _failed(error.problem, error.remedy, as_json, 2)
    except SystemExit as stop:  # argparse has printed the help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        resumed = "Repeat the command to go on where it stopped."
        remedy = resumed if given and given[0] in _RESUMED else "Nothing was written."
        return _failed("stopped.", remedy, as_json, 2)
    except BrokenPipeError:
        return 0
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return _failed(
            f"{type(error).__name__}: {error}",
            "This is a defect of layerwise: please report it with the lines above.",
            as_json,
            1,
        )


def _do(given: Sequence[str]) -> int:
    parser = build(given)
    chosen = parser.parse_args(given)
    if chosen.version:
        import layerwise

        print(layerwise.__version__)
        return 0
    if chosen.command is None:
        parser.print_help(sys.stderr)
        return 2
    from layerwise.cli import commands

    return getattr(commands, chosen.command)(chosen, given)


def _failed(problem: str, remedy: str, as_json: bool, status: int) -> int:
    print(f"layerwise: {problem}\n{remedy}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": problem, "remedy": remedy}))
    return status
