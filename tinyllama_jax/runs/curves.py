"""Pictures of what runs learnt: a PNG, and an HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.runs.metrics import read_metrics

PICTURE = "loss.png"

# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too pale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _FAINT, _GRID = "#222222", "#6b6b6b", "#e3e3e3"


@dataclass(frozen=True)
class Curve:
    """A series over tokens: both arrays `(points,)` float64."""

    tokens: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of one run; `validation` is by source."""

    label: str
    records: list[dict[str, Any]]
    loss: Curve
    validation: dict[str, Curve]
    learning_rate: Curve
    grad_norm: Curve


def write_loss_picture(run_dir: Path) -> None:
    """Draws RUN/loss.png.

    Raises:
      ValueError: the run has no metrics yet.
      OSError: it cannot be written.
    """
    draw([run_dir], Path(run_dir) / PICTURE)


def draw(run_dirs: Sequence[Path], out: Path) -> None:
    """Draws the runs into one picture: loss, learning rate and gradient norm over tokens.

    Args:
      run_dirs: run directories with metrics.
      out: where the picture goes; the ending chooses the format (.png, .svg, .pdf).

    Raises:
      ValueError: a run has no metrics, or matplotlib does not know the format.
      OSError: it cannot be written.
    """
    ending = out.suffix.lstrip(".").lower()
    if not ending:
        raise ValueError(f"{out} has no ending that names a format; write {out}.png or {out}.svg")
    data = _rendered(read_curves(run_dirs), ending)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(out)  # whoever looks while a run draws sees the old picture or the new one


def write_html(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes a page with the picture and a table of final numbers, without outside resources.

    Raises:
      ValueError: a run has no metrics.
      OSError: it cannot be written.
    """
    runs = read_curves(run_dirs)
    picture = base64.b64encode(_rendered(runs, "png")).decode()
    title = ", ".join(run.label for run in runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        _PAGE.format(
            title=html.escape(title),
            picture=picture,
            table=_table([final_numbers(run) for run in runs]),
        )
    )


def read_curves(run_dirs: Sequence[Path]) -> list[RunCurves]:
    """Reads the metrics of runs, each labelled by as much of its path as tells it from the rest."""
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    return [
        _curves(label, read_metrics(path))
        for label, path in zip(_labels(paths), paths, strict=True)
    ]


def final_numbers(run: RunCurves) -> dict[str, str]:
    """The last values of a run, ready to print, by the name of the column."""
    last = max(run.records, key=lambda record: record["step"])  # a failed save is told later
    numbers = {"run": run.label, "steps": f"{last['step']:,}"}
    tokens = last.get("tokens_seen")
    numbers["tokens"] = _count(tokens) if tokens is not None else ""
    if len(run.loss.values):
        numbers["training loss"] = f"{smooth(run.loss.values)[-1]:.4f}"
    for source, curve in run.validation.items():
        numbers[f"validation loss ({source})"] = f"{curve.values[-1]:.4f}"
    speeds = [record["tokens_per_second"] for record in run.records
              if "tokens_per_second" in record]  # fmt: skip
    if speeds:
        numbers["tokens/s (median)"] = f"{np.median(speeds):,.0f}"
    return numbers


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a window of about a fiftieth of the points around each.

    The window shrinks on both sides towards the start, where the curve is steep, and is cut off at
    the end; points that are not finite are passed over.

    Args:
      values: `(points,)` float64.
    """
    count = len(values)
    half = count // 100
    index = np.arange(count)
    low = index - np.minimum(index, half)
    high = np.minimum(index + np.minimum(index, half), count - 1) + 1
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _curves(label: str, records: list[dict[str, Any]]) -> RunCurves:
    sources = sorted(
        {name.split("/", 1)[1].rpartition("/")[0] for record in records for name in record
         if name.startswith("eval/") and name.endswith("/loss") and name.count("/") > 1}
    )  # fmt: skip
    return RunCurves(
        label,
        records,
        _curve(records, "loss"),
        {source: _curve(records, f"eval/{source}/loss") for source in sources},
        _curve(records, "learning_rate"),
        _curve(records, "grad_norm"),
    )


def _curve(records: list[dict[str, Any]], name: str) -> Curve:
    points = [
        (record.get("tokens_seen", record["step"]), record[name])
        for record in records
        if name in record
    ]
    tokens, values = np.array(points, np.float64).reshape(-1, 2).T
    return Curve(tokens, values)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that differ, same number of folders for all."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path} ({index})" for index, path in enumerate(paths, start=1)]


def _rendered(runs: Sequence[RunCurves], ending: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(9, 7), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1, 1))
    for axes in (loss, rate, norm):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)

    _draw_loss(loss, runs)
    for colour, run in zip(_cycled(_COLOURS, len(runs)), runs, strict=True):
        rate.plot(run.learning_rate.tokens, run.learning_rate.values, color=colour, linewidth=1.4)
        norm.plot(run.grad_norm.tokens, run.grad_norm.values, color=colour, linewidth=0.5,
                  alpha=0.35)  # fmt: skip
        norm.plot(run.grad_norm.tokens, smooth(run.grad_norm.values), color=colour, linewidth=1.4)
    loss.set_title(
        f"{runs[0].label}: loss" if len(runs) == 1 else "Loss by run",
        loc="left", fontsize=13, color=_INK, pad=10,
    )  # fmt: skip
    loss.set_ylabel("nats per token", color=_INK)
    rate.set_ylabel("learning rate", color=_INK, fontsize=9)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_locator(MaxNLocator(3))
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_power(value)))
    norm.set_ylabel("grad norm", color=_INK, fontsize=9)
    if any(np.any(run.grad_norm.values > 0) for run in runs):
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norm.yaxis.set_minor_formatter(NullFormatter())
    norm.set_xlabel("training tokens", color=_INK)
    norm.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    figure.align_ylabels((loss, rate, norm))

    buffer = io.BytesIO()
    canvas.print_figure(buffer, format=ending, dpi=160)
    return buffer.getvalue()


def _draw_loss(axes: Any, runs: Sequence[RunCurves]) -> None:
    """Raw training loss faint, smoothed solid; validation as marked lines, one marker a source."""
    sources = sorted({source for run in runs for source in run.validation})
    markers = dict(zip(sources, _cycled(_MARKERS, len(sources)), strict=True))
    alone = len(runs) == 1
    shown = []
    for index, run in enumerate(runs):
        colour = _COLOURS[index % len(_COLOURS)]
        mean = smooth(run.loss.values)
        axes.plot(run.loss.tokens, run.loss.values, color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(run.loss.tokens, mean, color=colour, linewidth=1.8,
                  label=_with_last("training" if alone else run.label, mean))  # fmt: skip
        shown.append(mean)
        for offset, (source, curve) in enumerate(run.validation.items(), start=1):
            name = f"validation, {source}" if alone else f"{run.label}, validation {source}"
            axes.plot(
                curve.tokens, curve.values,
                color=_COLOURS[offset % len(_COLOURS)] if alone else colour,
                linestyle=(0, (4, 2)), linewidth=1.2, marker=markers[source], markersize=5,
                markeredgecolor="white", markeredgewidth=0.6, zorder=3,
                label=_with_last(name, curve.values),
            )  # fmt: skip
            shown.append(curve.values)
    values = np.concatenate(shown) if shown else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values):
        # By what is smoothed, so that a single spike of a step does not flatten the rest.
        room = 0.05 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - room, values.max() + room)
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")


def _with_last(name: str, values: np.ndarray) -> str:
    return f"{name} ({values[-1]:.3f})" if len(values) else name


def _cycled(choices: Sequence[str], count: int) -> list[str]:
    return [choices[index % len(choices)] for index in range(count)]


def _count(number: float) -> str:
    """A count as people write it: 1.5T, 300B, 20M, 4k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _short_power(number: float) -> str:
    """A small number as a config writes it: 4e-4, 8e-3, 0."""
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if number else "0"


def _table(rows: Sequence[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row.get(c, ''))}</td>" for c in columns) + "</tr>\n"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; font-weight: 600; }}
img {{ width: 100%; height: auto; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ font-weight: 600; font-size: .85rem; color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
<img alt="Loss, learning rate and gradient norm over training tokens"
  src="data:image/png;base64,{picture}">
<div class="table">
{table}
</div>
</body>
</html>
"""
