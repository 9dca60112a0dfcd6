"""Draws loss curves: `python -m tinyllama_jax.plot RUN... [--out loss.png] [--html out.html]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyllama_jax import door
from tinyllama_jax.runs.curves import PICTURE, draw, final_numbers, read_curves, write_html
from tinyllama_jax.runs.directory import resolve_run


def main(arguments: list[str] | None = None) -> None:
    """Draws the runs into one picture and prints their last numbers."""
    parser = argparse.ArgumentParser(prog="python -m tinyllama_jax.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, drawn together")
    parser.add_argument("--out", type=Path, help=f"the picture; default RUN/{PICTURE} for one run, "
                        f"{PICTURE} here for several")  # fmt: skip
    parser.add_argument("--html", type=Path, help="a page with the picture and a table as well")
    options = parser.parse_args(arguments)
    runs = [resolve_run(run) for run in options.runs]
    out = options.out or (runs[0] / PICTURE if len(runs) == 1 else Path(PICTURE))

    draw(runs, out)
    for run in read_curves(runs):
        name, *numbers = final_numbers(run).items()
        print(f"{name[1]}: " + ", ".join(f"{column} {value}" for column, value in numbers))
    print(f"wrote {out}")
    if options.html:
        write_html(runs, options.html)
        print(f"wrote {options.html}, a page on its own: open it in a browser, or send it")
    else:
        names = " ".join(options.runs)
        print(f"next: python -m tinyllama_jax.plot {names} --html curves.html, to send it around")


if __name__ == "__main__":
    door.run(main)
