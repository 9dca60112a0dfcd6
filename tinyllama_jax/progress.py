"""How long work shows itself: a bar on a terminal, a plain line per interval elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts work done and says so, with rate and remaining time.

    Args:
      total: units of work in all; 0 where it is not known.
      unit: what is counted, as printed after numbers.
      initial: units done before this start.
      scale: print counts with k, M, G.
      interval: seconds between plain lines where the output is no terminal.
    """

    def __init__(
        self, total: int, unit: str, *, initial: int = 0, scale: bool = False, interval: float = 10
    ):
        self._plain = not sys.stderr.isatty()
        self._total, self._unit, self._done, self._initial = total, unit, initial, initial
        self._interval, self._started = interval, time.monotonic()
        self._last_line, self._note = self._started, ""
        # One for all lines, by the total.
        prefixes = [("", 1)] + [("k", 10**3), ("M", 10**6), ("G", 10**9)] * scale
        self._prefix = next(p for p in reversed(prefixes) if p[1] <= max(total, 1))
        self._bar = None
        if not self._plain:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total or None, unit=unit, initial=initial, unit_scale=scale,
                dynamic_ncols=True, leave=True,
            )  # fmt: skip

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds finished units; note is shown beside the count."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            self._line()

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> None:
        rate = (self._done - self._initial) / (time.monotonic() - self._started)
        of = f"/{self._count(self._total)}" if self._total else ""
        left = f", {_clock((self._total - self._done) / rate)} left" if self._total and rate else ""
        note = f", {self._note}" if self._note else ""
        print(
            f"{self._count(self._done)}{of} {self._prefix[0]}{self._unit}{note}{left}", flush=True
        )

    def _count(self, count: int) -> str:
        return f"{count / self._prefix[1]:.1f}" if self._prefix[0] else str(count)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
