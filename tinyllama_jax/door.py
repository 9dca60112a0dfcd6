"""What every door does alike: an error that a user can mend is a message, not a traceback."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging


def run(main: Callable[..., Any], *arguments: Any) -> None:
    """Calls a door's main and exits: 0, or 1 with the message of a ValueError or OSError.

    Set TINYLLAMA_TRACEBACK=1 to see where such an error arose.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    try:
        main(*arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("TINYLLAMA_TRACEBACK"):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_with_flags(main: Callable[[list[str]], Any], *, needs_config: bool = True) -> None:
    """As `run`, for a door with absl's flags: a mistake in a flag is a message too.

    Args:
      main: takes what is left of the command line.
      needs_config: nothing goes without `--config`.
    """
    parse = functools.partial(_parse_flags, needs_config=needs_config)
    app.run(functools.partial(run, main), flags_parser=parse)


def settings_given() -> str:
    """The flags of this command line that name or change the config, to be given again."""
    given, take_next = [], False
    for argument in sys.argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        if take_next or (argument.startswith("-") and name.split(".")[0] in ("config", "workdir")):
            given.append(argument)
            take_next = not take_next and not equals
    return shlex.join(given)


def _parse_flags(argv: list[str], needs_config: bool) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        _fail(f"{error}; settings are given as --config.SECTION.SETTING=VALUE")
    except flags.Error as error:
        _fail(f"{error}; --helpshort lists the flags")
    except (AttributeError, KeyError) as error:  # so ml_collections says that there is no such key
        _fail(_no_such_setting(argv, error))
    if needs_config and not any(a.lstrip("-").split("=")[0] == "config" for a in argv[1:]):
        _fail(
            "no --config: name the file that holds the settings, for example "
            "--config=configs/quickstart.py"
        )
    return rest


def _no_such_setting(argv: list[str], error: Exception) -> str:
    reason: Any = error
    while isinstance(reason, BaseException):
        reason = reason.args[0]
    key, _, hint = reason.partition("\n")
    key = key.strip("'")
    flag = next((argument for argument in argv if f".{key}" in argument), "--config")
    return f'{flag}: "{key}" is not a setting of the config. {hint}'.rstrip()


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
