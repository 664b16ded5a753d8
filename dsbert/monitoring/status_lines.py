"""A run's status for people, in lines of at most 80 columns: one run at length, several as a table."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Sequence

from dsbert.base.errors import printable
from dsbert.base.progress import duration
from dsbert.base.text_table import table
from dsbert.monitoring.run_status import RunStatus
from dsbert.monitoring.timeline import Stretch

_BARS = "▁▂▃▄▅▆▇█"
# Attempts that are shown; of more, the oldest are counted.
_ATTEMPTS = 6
_WIDTH = 80


def status_lines(status: RunStatus) -> Iterator[str]:
    """One run."""
    why = f" ({status.standing.why})" if status.standing.why else ""
    yield from _wrapped("", f"{status.run}: {status.standing.state}{why}", indent=2)
    for head, text in _facts(status):
        yield from _wrapped(f"  {head:<12} ", text)
    older = len(status.attempts) - _ATTEMPTS
    if older > 0:
        yield f"  attempts     {older} before these"
    for one in status.attempts[-_ATTEMPTS:] if len(status.attempts) > 1 else ():
        yield from _wrapped(f"  attempt {one.number:<4} ", _attempt(one))


def status_table(found: Sequence[RunStatus]) -> str:
    """A row for each run."""
    heads = ("run", "state", "step", "%", "left", "loss", "tokens/s", "good", "again")
    rows = [
        (
            one.run,
            one.standing.state,
            f"{one.step:,}",
            f"{100 * one.step / one.total_steps:.0f}" if one.total_steps else "",
            duration(one.eta_s) if one.eta_s is not None else "",
            f"{one.loss:.3f}" if one.loss is not None else "",
            f"{one.tokens_per_s:,.0f}" if one.tokens_per_s is not None else "",
            f"{one.spending.goodput:.0%}" if one.spending.total else "",
            str(one.restarts or ""),
        )
        for one in found
    ]
    return table(heads, rows)


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, the lowest least high."""
    if not values:
        return ""
    least, most = min(values), max(values)
    return "".join(_BARS[round((value - least) / ((most - least) or 1.0) * (len(_BARS) - 1))] for value in values)


def _wrapped(head: str, text: str, indent: int = 15) -> list[str]:
    """At 80 columns; hosts, causes and names come from files."""
    lines = textwrap.wrap(
        printable(text), _WIDTH, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False
    )
    return lines or [head.rstrip()]


def _facts(status: RunStatus) -> Iterator[tuple[str, str]]:
    left = f", {duration(status.eta_s)} left" if status.eta_s is not None else ""
    of = f" of {status.total_steps:,} ({status.step / status.total_steps:.1%})" if status.total_steps else ""
    yield "step", f"{status.step:,}{of}{left}"
    if status.loss is not None:
        held_out = f", held-out MLM {status.val_loss:.3f}" if status.val_loss is not None else ""
        yield "loss", f"{status.loss:.3f}{held_out}  {sparkline(status.curve)}"
    if status.tokens_per_s is not None and status.step_s is not None:
        flops = f", {status.flops_per_s / 1e9:,.1f} GFLOP/s" if status.flops_per_s else ""
        mfu = f", MFU {status.mfu:.1%}" if status.mfu is not None else ""
        yield "speed", f"{status.tokens_per_s:,.0f} tokens/s{flops}{mfu}, {status.step_s:.3g} s a step"
    if status.ranks:
        yield "ranks", f"{status.ranks} on {', '.join(status.hosts) or 'unknown hosts'}"
    if (one := status.slowest_rank) is not None:
        named = ", a straggler" if one.straggler else ""
        yield (
            "slowest",
            f"rank {one.rank} on {one.host or 'an unknown host'}: {one.own_s:.3g} s of its own a step, the median rank "
            f"{one.median_s:.3g} s ({one.cause}{named})",
        )
    if status.heartbeat_age_s is not None:
        slowest = f"; slowest: {status.slowest}" if status.slowest else ""
        yield "heartbeat", f"{duration(status.heartbeat_age_s)} ago{slowest}"
    if status.checkpoint and status.checkpoint_age_s is not None:
        yield "checkpoint", f"{status.checkpoint}, {duration(status.checkpoint_age_s)} ago"
    if status.skipped:
        yield "skipped", f"{status.skipped} steps that were not finite"
    spent = status.spending
    if spent.total:
        parts = {
            "steps": spent.steps, "evaluation": spent.evaluation, "saves": spent.saves, "taken again": spent.lost,
            "between attempts": spent.down, "other": spent.other,
        }  # fmt: skip
        shares = ", ".join(f"{name} {share:.0%}" for name, s in parts.items() if (share := s / spent.total) >= 0.005)
        yield "time", f"{duration(spent.total)}: {shares}"
    if status.restarts:
        yield "restarts", f"{status.restarts}, {status.lost_steps} steps taken again, goodput {spent.goodput:.1%}"


def _attempt(one: Stretch) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.started)) if one.started else "?"
    end = one.outcome or ("goes on" if one.ended is None else "ended without a word")
    cause = f": {one.cause}" if one.cause and one.cause != end else ""
    lost = f", {one.lost_steps} taken again" if one.lost_steps else ""
    job = f"job {one.job_id}, " if one.job_id else ""
    last = one.last_step if one.last_step is not None else "?"
    return f"{when}, {job}{one.ranks or '?'} ranks, steps {one.first_step} to {last}{lost}, {end}{cause}"
