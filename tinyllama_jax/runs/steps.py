"""The step directories of a run, and which of them are kept.

`<step>` is published, `<step>.unsealed-<n>` is being written (by the n-th save of a process),
`<step>.replaced` gives way to a new save of the same step, `<step>.superseded` lies beyond where
the run was rewound to, `<step>.removed` is being deleted. Renames lead from one to the next, so
that a kill leaves nothing half done under a step's own name.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllama_jax.durable import sync_directory
from tinyllama_jax.runs import integrity

# Somebody writes there: threads that nobody stops, of a save that was given up.
_IN_USE = (errno.ENOTEMPTY, errno.ENOENT)
_TRANSIENT = re.compile(r"\d+\.(unsealed|replaced|superseded|removed)")


def steps_to_keep(
    steps: Sequence[int],
    keep_last: int,
    milestone_tokens: int,
    tokens_at: Callable[[int], int] | None,
) -> set[int]:
    """The newest `keep_last` steps, and the first step at or past each multiple of
    `milestone_tokens` (0: none) tokens.

    Args:
      steps: the sealed steps, ascending.
      tokens_at: the tokens that so many steps see; None where there are no milestones.
    """
    keep = set(steps[-keep_last:])
    reached = 0
    if not milestone_tokens or tokens_at is None:
        return keep
    for step in steps:
        multiple = tokens_at(step) // milestone_tokens
        if multiple > reached:
            keep.add(step)
            reached = multiple
    return keep


def undo_interrupted_replacement(directory: Path) -> None:
    """Brings back a step whose replacement was killed between its two renames."""
    for replaced in directory.glob("*.replaced"):
        final = replaced.with_suffix("")
        if not final.exists():
            replaced.rename(final)


def unsealed_path(directory: Path, step: int, attempt: int) -> Path:
    """Where a step is written: another place each time, as an attempt that failed may go on."""
    return directory / f"{step}.unsealed-{attempt}"


def publish(unsealed: Path, step: int) -> None:
    """Gives a sealed step its name; a step that had it before is deleted."""
    directory = unsealed.parent
    final = directory / str(step)
    replaced = directory / f"{step}.replaced"
    if final.exists():
        final.rename(replaced)
    unsealed.rename(final)
    sync_directory(directory)
    if replaced.exists():
        shutil.rmtree(replaced)


def remove(path: Path) -> None:
    """Deletes a step so that a kill leaves no half of it under its name."""
    removed = path.with_name(f"{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def supersede(directory: Path, step: int) -> list[int]:
    """Takes the steps beyond one out of the run, until a later save deletes them."""
    beyond = [path for path in step_directories(directory) if int(path.name) > step]
    for path in beyond:
        superseded = path.with_name(f"{path.name}.superseded")
        if superseded.exists():
            shutil.rmtree(superseded)
        path.rename(superseded)
    return [int(path.name) for path in beyond]


def remove_transient(directory: Path) -> None:
    """Deletes what killed or failed saves and deletions have left."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if _TRANSIENT.match(path.name):
            try:
                shutil.rmtree(path)
            except OSError as error:
                if error.errno not in _IN_USE:  # else the next one deletes the rest
                    raise


def step_directories(directory: Path) -> list[Path]:
    """Everything that bears a step's name, ascending, sealed or not."""
    if not directory.is_dir():
        return []
    steps = (path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())
    return sorted(steps, key=lambda path: int(path.name))


def sealed_steps(directory: Path) -> list[int]:
    """The steps that have a seal, ascending; whether it holds is for the reader to see."""
    paths = step_directories(directory)
    return [int(path.name) for path in paths if (path / integrity.SEAL).is_file()]
