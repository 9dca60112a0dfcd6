"""Files that a crash or a power failure leaves either as they were or as they should be."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file whole or not at all: temporary name, fsync, rename, fsync of the directory.

    The temporary name is the call's own, so that of two processes that write the same file the
    later one wins and neither fails.

    Raises:
      OSError: it cannot be written; the old file stands.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames within a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
