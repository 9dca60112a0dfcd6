"""An audit as a page on its own: findings, streams and pictures, without outside resources."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from typing import Any

import numpy as np

from tinyllama_jax.data.audit import Audit, StreamAudit, is_held_out
from tinyllama_jax.data.scan import LENGTH_BINS
from tinyllama_jax.text.tokenizer import Tokenizer

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_INK, _GRID = "#333333", "#e5e5e5"
_MOST_STREAMS = 12  # in a picture; the largest
_TOP_IDS = 12
_MARKS = {"ok": "ok", "warning": "look", "problem": "wrong"}


def write_page(
    audit: Audit, directory: pathlib.Path, tokenizer: Tokenizer | None, out: pathlib.Path
) -> None:
    """Writes the page; raises OSError where that fails."""
    streams = sorted(audit.streams, key=lambda stream: -stream.scan.tokens)
    findings = "".join(
        f'<tr><td class="{finding.level}">{_MARKS[finding.level]}</td>'
        f"<td>{html.escape(finding.subject)}</td><td>{html.escape(finding.text)}</td></tr>"
        for finding in audit.findings
    )
    rows = "".join(_stream_row(stream) for stream in streams)
    drawn = [stream for stream in streams if not is_held_out(stream)][:_MOST_STREAMS]
    picture = base64.b64encode(_picture(drawn)).decode()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        _PAGE.format(
            title=html.escape(str(directory)), findings=findings, streams=rows, picture=picture,
            top=_top_ids(streams, tokenizer),
        )
    )  # fmt: skip


def _stream_row(stream: StreamAudit) -> str:
    scan = stream.scan
    per_token = f"{stream.text_bytes / scan.tokens:.2f}" if stream.text_bytes else ""
    numbers = (
        f"{len(scan.sha256):,}", f"{scan.documents:,}", f"{scan.tokens:,}",
        f"{scan.bytes / 1e6:,.1f}", f"{scan.tokens / max(1, scan.documents):,.0f}", per_token,
        f"{int((scan.token_counts > 0).sum()):,}",
    )  # fmt: skip
    cells = "".join(f"<td class=n>{number}</td>" for number in numbers)
    return f"<tr><td>{html.escape(stream.name)}</td>{cells}</tr>"


def _top_ids(streams: list[StreamAudit], tokenizer: Tokenizer | None) -> str:
    counts = np.zeros(max((len(s.scan.token_counts) for s in streams), default=0), np.int64)
    for stream in streams:
        counts[: len(stream.scan.token_counts)] += stream.scan.token_counts
    total = max(1, int(counts.sum()))
    cells = []
    for token_id in np.argsort(-counts, kind="stable")[:_TOP_IDS]:
        text = ""
        if tokenizer is not None and token_id < tokenizer.vocab_size:
            text = html.escape(tokenizer.piece(int(token_id)))
        cells.append(
            f"<tr><td class=n>{token_id}</td><td><code>{text}</code></td>"
            f"<td class=n>{counts[token_id]:,}</td><td class=n>{counts[token_id] / total:.2%}</td>"
            "</tr>"
        )
    return "".join(cells)


def _picture(streams: list[StreamAudit]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    bars = 0.6 + 0.28 * len(streams)
    figure = Figure(figsize=(9, 3.6 + bars), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(bars, 3.6))
    upper, lower = halves
    sizes = upper.subplots()
    lengths, ranks = lower.subplots(1, 2)
    for axes, title in (
        (sizes, "tokens"),
        (lengths, "share of the documents, by tokens each"),
        (ranks, "share of the tokens, by rank of the id"),
    ):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelcolor=_INK, labelsize=8)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=10, color=_INK)
    places = range(len(streams))
    colours = [_COLOURS[number % len(_COLOURS)] for number in places]
    sizes.barh(places, [stream.scan.tokens for stream in streams], color=colours, height=0.7)
    sizes.set_yticks(places, [stream.name for stream in streams])
    sizes.invert_yaxis()
    sizes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    middles = 2.0 ** (np.arange(LENGTH_BINS) + 0.5)
    for stream, colour in zip(streams, colours, strict=True):
        of_length, counts = stream.scan.lengths, stream.scan.token_counts
        used = np.flatnonzero(of_length)
        if len(used):
            shown = slice(max(0, used[0] - 1), used[-1] + 2)
            lengths.plot(middles[shown], of_length[shown] / of_length.sum(), color=colour,
                         linewidth=1.4, marker=".")  # fmt: skip
        counts = np.sort(counts[counts > 0])[::-1]
        if len(counts):
            ranks.plot(np.arange(1, len(counts) + 1), counts / counts.sum(), color=colour,
                       linewidth=1.4)  # fmt: skip
    lengths.set_xscale("log")
    ranks.set_xscale("log")
    ranks.set_yscale("log")
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Audit: {title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.25rem 0.6rem;
  border-bottom: 1px solid #e5e5e5; overflow-wrap: anywhere; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.ok {{ color: #00704f; }} .warning {{ color: #a05a00; font-weight: 600; }}
.problem {{ color: #b3261e; font-weight: 600; }}
img {{ width: 100%; }}
</style></head><body>
<h1>Audit of {title}</h1>
<table>{findings}</table>
<h2>What it holds</h2>
<table><tr><th>stream</th><th class=n>files</th><th class=n>documents</th><th class=n>tokens</th>
<th class=n>MB</th><th class=n>tokens a document</th><th class=n>bytes a token</th>
<th class=n>ids in use</th></tr>{streams}</table>
<img alt="tokens by stream, tokens by document, frequency of ids"
src="data:image/png;base64,{picture}">
<h2>The most frequent ids</h2>
<table><tr><th class=n>id</th><th>piece</th><th class=n>times</th><th class=n>share</th></tr>{top}
</table></body></html>
"""
