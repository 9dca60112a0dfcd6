"""What every door does alike: an error that a user can mend is a message, not a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import logging


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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
