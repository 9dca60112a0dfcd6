"""A plan as text and as a page."""

from __future__ import annotations

import collections
import dataclasses
import html

from tinyllama_jax.config import Config
from tinyllama_jax.parallel.devices import Cluster
from tinyllama_jax.parallel.mesh import AXES
from tinyllama_jax.planning.compile import CompiledStep
from tinyllama_jax.planning.estimate import Estimate
from tinyllama_jax.planning.measured import Comparison
from tinyllama_jax.training import flops

_GIB = 1 << 30
_BAR = 40
MORE_MEMORY = "XLA_CLIENT_MEM_FRACTION=0.97"  # the setting that lets jax take nearly all
_DEFAULT_FRACTION = 0.75  # of a card's memory that jax's allocator takes


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a config on a cluster, compiled and estimated.

    Attributes:
      config, cluster, shape: what was compiled (data x fsdp x tensor).
      compiled, estimate: what came out.
      change: the settings that differ from what was asked for; "" for that itself.
    """

    config: Config
    cluster: Cluster
    shape: tuple[int, int, int]
    compiled: CompiledStep
    estimate: Estimate
    change: str = ""

    @property
    def fits(self) -> bool:
        """Whether the card holds the peak, with 3% left for the driver, NCCL and fragmentation."""
        return self.compiled.peak_bytes <= 0.97 * self.cluster.gpu.memory_bytes


def memory_rows(plan: Plan) -> list[tuple[str, int]]:
    """Bytes per GPU by what they are for."""
    compiled = plan.compiled
    known = compiled.params_bytes + compiled.optimizer_bytes + compiled.temporary_bytes
    rows = [("params", compiled.params_bytes), ("optimizer", compiled.optimizer_bytes)]
    # The compiler gives one number for all that lives within a step. Of it, gradients summed over
    # passes are known: float32 as params, and there from the first pass to the last.
    if passes(plan) > 1:
        activations = compiled.temporary_bytes - compiled.params_bytes
        rows += [
            ("gradients, summed over passes", compiled.params_bytes),
            ("activations, gathered weights", activations),
        ]
    else:
        rows.append(("activations, gradients, gathered weights", compiled.temporary_bytes))
    return [*rows, ("batch and results", max(0, compiled.peak_bytes - known))]


def passes(plan: Plan) -> int:
    """Forward and backward passes per step."""
    return plan.config.accumulation_steps(plan.shape[0] * plan.shape[1])


def sent_rows(plan: Plan) -> list[tuple[str, int, int]]:
    """Kind of collective, bytes a GPU takes part in per step, and how often."""
    size: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for one in plan.compiled.collectives:
        size[one.kind] += one.bytes * one.times
        times[one.kind] += one.times
    return [(kind, size[kind], times[kind]) for kind, _ in size.most_common()]


def summary_rows(plan: Plan, price: float) -> list[tuple[str, str]]:
    """The figures of the run, ready to print."""
    e, training = plan.estimate, plan.config.training
    shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, plan.shape, strict=True))
    hidden = e.communication_seconds - e.exposed_seconds
    causal, palm = (
        training.global_batch_tokens * count(plan.config.model, plan.config.data.seq_len)
        for count in (flops.causal_flops_per_token, flops.palm_flops_per_token)
    )
    rows = [
        ("GPUs", f"{plan.cluster.hosts} x {plan.cluster.gpus_per_host} {plan.cluster.gpu.title}"),
        ("mesh", shape),
        (
            "step",
            f"{training.global_batch_tokens:,} tokens, {passes(plan)} passes of "
            f"{training.micro_batch_size} x {plan.config.data.seq_len} on each GPU",
        ),
        ("compiled in", f"{plan.compiled.seconds:.0f} s on this machine, without autotuning"),
        ("FLOPs per step", f"{causal:.4g} causal, {palm:.4g} by PaLM's count"),
        (
            "step time, at best",
            f"{e.step_seconds:.2f} s: products {e.matmul_seconds:.2f}, attention "
            f"{e.attention_seconds:.2f}, memory {e.memory_seconds:.2f}, waiting for others "
            f"{e.exposed_seconds:.2f} ({hidden:.2f} hidden)",
        ),
        (
            "speed, at best",
            f"{e.tokens_per_second:,.0f} tokens/s per GPU, MFU {e.mfu_causal:.1%} causal, "
            f"{e.mfu_palm:.1%} PaLM",
        ),
        (
            "run, at best",
            f"{e.days:.1f} days for {training.train_tokens:,} tokens, {e.gpu_hours:,.0f} GPU-hours",
        ),
    ]
    if price:
        rows.append(("cost, at best", f"{e.gpu_hours * price:,.0f} at {price:g} per GPU-hour"))
    return rows


def trust_lines(compared: list[Comparison]) -> list[str]:
    """How the estimate of time did where it can be checked."""
    if not compared:
        return ["no measurement on a GPU is held: nothing has checked the estimate of time yet"]
    return ["the estimate of time beside what was measured, tokens/s per GPU:"] + [
        f"  {c.estimated:,.0f} estimated, {c.measured:,.0f} measured ({c.error:+.0%}): {c.title}"
        for c in compared
    ]


def peak_line(plan: Plan) -> str:
    """The line that tells whether it fits."""
    peak, limit = plan.compiled.peak_bytes / _GIB, plan.cluster.gpu.memory_bytes / _GIB
    verdict = "fits" if plan.fits else "does NOT fit"
    return f"peak per GPU: {peak:.1f} GiB of {limit:.1f} GiB ({verdict})"


def memory_lines(plan: Plan) -> list[str]:
    """What to know of the peak beside its size."""
    lines = []
    if plan.compiled.recomputed_products:
        lines.append(
            f"to get there XLA computes {plan.compiled.recomputed_products} matrix products twice, "
            f"which the times leave out"
            + ("; see what model.remat=dots needs" if plan.config.model.remat == "none" else "")
        )
    if needs_more_memory(plan):
        lines.append(
            f"jax takes {_DEFAULT_FRACTION:.0%} of a card unless told otherwise: run with "
            f"{MORE_MEMORY}"
        )
    return lines


def needs_more_memory(plan: Plan) -> bool:
    """Whether it fits, but not into what jax takes of a card by default."""
    share = plan.compiled.peak_bytes / plan.cluster.gpu.memory_bytes
    return plan.fits and share > _DEFAULT_FRACTION


def text(plan: Plan, price: float, compared: list[Comparison]) -> str:
    """The plan for a terminal."""
    lines = [f"{name:<20}{value}" for name, value in summary_rows(plan, price)]
    lines += ["", peak_line(plan), *memory_lines(plan), ""]
    limit = plan.cluster.gpu.memory_bytes
    for name, size in memory_rows(plan):
        bar = "#" * round(_BAR * min(size / limit, 1))
        lines.append(f"  {name:<42}{size / _GIB:>7.2f} GiB |{bar:<{_BAR}}|")
    if rows := sent_rows(plan):
        lines += ["", "sent and received per GPU and step:"]
        lines += [f"  {kind:<20}{size / _GIB:>9.2f} GiB in {n:,}" for kind, size, n in rows]
    return "\n".join([*lines, "", *trust_lines(compared)])


def table(plans: list[Plan]) -> str:
    """What was tried, best first."""
    lines = [f"{'peak GiB':>8}{'tokens/s':>10}  settings"]
    lines += [f"{peak:>8}{speed:>10}  {name}" for name, peak, speed in _tried(plans)]
    return "\n".join(lines)


def ranked(plans: list[Plan]) -> list[Plan]:
    """The fastest that fits first; what does not fit last."""
    return sorted(plans, key=lambda p: (not p.fits, -p.estimate.tokens_per_second))


def _tried(plans: list[Plan]) -> list[tuple[str, str, str]]:
    return [
        (
            (plan.change or "(as it is)") + ("" if plan.fits else " (does NOT fit)"),
            f"{plan.compiled.peak_bytes / _GIB:.1f}",
            f"{plan.estimate.tokens_per_second:,.0f}",
        )
        for plan in ranked(plans)
    ]


def page(plan: Plan, tried: list[Plan], price: float, compared: list[Comparison]) -> str:
    """The plan as an HTML page that needs nothing else."""
    limit = plan.cluster.gpu.memory_bytes
    bars = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{size / _GIB:.2f}</td>"
        f"<td class=b><div style='width:{100 * min(size / limit, 1):.1f}%'></div></td></tr>"
        for name, size in memory_rows(plan)
    )
    summary = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in summary_rows(plan, price)
    )
    sent = "".join(
        f"<tr><td>{kind}</td><td class=n>{size / _GIB:.2f}</td><td class=n>{times:,}</td></tr>"
        for kind, size, times in sent_rows(plan)
    )
    others = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{peak}</td><td class=n>{speed}</td></tr>"
        for name, peak, speed in _tried(tried)
    )
    return _PAGE.format(
        title=html.escape(f"{plan.cluster.size} x {plan.cluster.gpu.title}"),
        trust="<br>".join(map(html.escape, trust_lines(compared))),
        peak=html.escape(peak_line(plan)),
        notes="<br>".join(map(html.escape, memory_lines(plan))), bars=bars, summary=summary,
        sent=f"<h2>Sent per GPU and step, GiB and times</h2><table>{sent}</table>" if sent else "",
        others=f"<h2>Tried, best first: peak GiB and tokens/s per GPU</h2><table>{others}</table>"
        if others else "",
    )  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Plan: {title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 62em;
  padding: 0 1em }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin-top: 1.6em }}
table {{ border-collapse: collapse; width: 100% }}
td {{ padding: .25em .8em .25em 0; border-bottom: 1px solid #e3e3e3; vertical-align: top }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; width: 6em }}
td.b {{ width: 45%; background: #f4f4f4; padding: 0 }}
td.b div {{ background: #0072B2; height: 1.2em }}
</style></head><body>
<h1>Plan: {title}</h1>
<table>{summary}</table>
<p>{trust}</p>
<h2>{peak}</h2>
<p>{notes}</p>
<table>{bars}</table>
{sent}
{others}
</body></html>
"""
