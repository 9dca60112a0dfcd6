"""A directory that appears only when everything in it is written."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def fresh_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a directory `<path>.partial` to write into, which becomes `path` on leaving.

    After an error nothing is left; after a kill the partial directory is, and the next try replaces
    it.

    Raises:
      ValueError: `path` exists and is not an empty directory.
    """
    check_free(path)
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(path: pathlib.Path) -> None:
    """Raises ValueError where something stands at `path` that writing there would destroy."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise ValueError(
            f"{path} already exists and is not an empty directory; nothing is overwritten: "
            f"remove it, or choose another --out"
        )
