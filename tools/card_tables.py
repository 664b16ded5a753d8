"""The page of tools/card_suite.py, as Markdown, from its lines alone: whatever has been found so far."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from card_records import Record


def render(records: list[Record]) -> str:
    """Everything, in one page."""
    kinds: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        kinds[record["kind"]].append(record)
    suite = kinds["suite"][0] if kinds["suite"] else {}
    rates = {k: v for record in kinds["rates"] for k, v in record.items() if k not in ("stage", "kind")}
    versions = ", ".join(f"{name} {version}" for name, version in suite.get("versions", {}).items())
    lines = [f"# {suite.get('device', 'No card yet')}", "", versions, ""]
    if rates:
        lines += [", ".join(f"{name} {value:.2f}" for name, value in rates.items()), ""]
    lines += _section("Stages", _stages(kinds["outcome"]))
    lines += _section("Parity with float64: largest relative error (Frobenius)", _parity(kinds["check"]))
    lines += _section("Tests", _plain(kinds["test"], ("test", "outcome", "seconds")))
    lines += _section("Forward and backward over the sparse products of a layer", _layers(kinds["product"]))
    lines += _section("Whole steps", _steps(kinds["step"], rates.get("bf16_tflop_s")))
    lines += _section("Where the seconds of a step go", _parts(kinds["step"]))
    lines += _section("Training", _training(kinds["run"], kinds["progress"], rates.get("bf16_tflop_s")))
    lines += _section("Every product", _products(kinds["product"]))
    lines += _section("Fastest launches", _launches(kinds["launch"]))
    return "\n".join(lines)


def _section(title: str, table: list[str]) -> list[str]:
    return [f"## {title}", "", *table, ""] if table else []


def _table(heads: Iterable[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    heads = list(heads)
    return [f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *rows]]


def _plain(records: list[Record], keys: tuple[str, ...]) -> list[str]:
    return _table(keys, [[record.get(key, "") for key in keys] for record in records])


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _stages(outcomes: list[Record]) -> list[str]:
    return _plain(outcomes, ("of", "outcome", "seconds", "limit_s", "why"))


def _parity(checks: list[Record]) -> list[str]:
    """By dtype and product; what is not finite, or further off than allowed, is said to be wrong."""
    groups: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for check in checks:
        groups[check["dtype"], check["product"]].append(check)
    rows = []
    for (dtype, product), every in sorted(groups.items()):
        errors = [check["rel_error"] for check in every if check["rel_error"] is not None]
        wrong = sum(not check["passed"] for check in every)
        rows.append([dtype, product, len(every), wrong, _number(max(errors, default=None), 2)])
    return _table(["dtype", "product", "checks", "wrong", "largest error"], rows)


def _layers(products: list[Record]) -> list[str]:
    """Sums over shapes and products, where a backend has all that were timed dense."""
    sums: defaultdict[tuple[int, int, str], list[Record]] = defaultdict(list)
    for record in products:
        if record.get("ms") is not None:
            sums[record["hidden"], record["block"], record["backend"]].append(record)
    rows = []
    for (hidden, block, backend), every in sorted(sums.items()):
        if backend != "dense" and len(every) == len(sums[hidden, block, "dense"]):
            ours, dense = (sum(record[key] for record in every) for key in ("ms", "dense_ms"))
            rows.append([hidden, block, backend, f"{ours:.3f}", f"{dense:.3f}", f"{dense / ours:.2f}"])
    return _table(["H", "B", "backend", "ms", "dense ms", "times faster"], rows)


def _products(products: list[Record]) -> list[str]:
    rows = [
        [record["layer"], record["in"], record["out"], record["block"], record["product"], record["backend"],
         f"{record['ms']:.4f}", f"{record['dense_ms']:.4f}", f"{record['speedup_vs_dense']:.2f}",
         f"{record['gflops']:.0f}", _number(record["rel_error"], 2)]
        if record.get("ms") is not None
        else [record["layer"], "", "", record["block"], record["product"], record["backend"], record.get("error", ""),
              "", "", "", ""]
        for record in products
    ]  # fmt: skip
    heads = "layer in out B product backend ms dense_ms times_faster GFLOP/s_kept error"
    return _table((head.replace("_", " ") for head in heads.split()), rows)


def _steps(steps: list[Record], peak: float | None) -> list[str]:
    """MFU: the paper's FLOPs of the weights that are kept, a second, over what the card does in one large product."""
    rows = []
    for step in steps:
        mfu = [_share(step[f"{name}_tflop"] / step[f"{name}_step_s"], peak) for name in ("dense", "sparse")]
        rows.append(
            [step["recipe"], step["block"], step["dtype"], f"{step['batch']} x {step['seq']}", step["dense_step_s"],
             step["sparse_step_s"], step.get("transformers_step_s", ""), step["speedup"],
             step.get("sparse_vs_transformers", ""), *mfu, "; ".join(step["kernels"])]
        )  # fmt: skip
    heads = "recipe,B,dtype,batch x seq,dense s,sparse s,transformers s,times dense,times transformers,MFU dense"
    return _table([*heads.split(","), "MFU sparse", "kernels"], rows)


def _parts(steps: list[Record]) -> list[str]:
    rows = [
        [step["recipe"], step["block"], part, seconds["dense_s"], seconds["sparse_s"]]
        for step in steps
        for part, seconds in step["breakdown"].items()
    ]
    return _table(["recipe", "B", "part", "dense s", "sparse s"], rows)


def _training(runs: list[Record], progress: list[Record], peak: float | None) -> list[str]:
    lines = []
    for attempt in sorted({row["attempt"] for row in progress}):
        rows = [row for row in progress if row["attempt"] == attempt]
        # What neither saves nor validates, and not the first, which waits for kernels to be compiled.
        calm = [row for row in rows[1:] if not row["save_s"] and not row["validation_s"]] or rows
        rate = statistics.median(row["tokens_per_s"] for row in calm)
        flops = rows[-1]["flops_total"] / rows[-1]["tokens_total"]
        validated = [row["val_mlm_loss"] for row in rows if row.get("val_mlm_loss") is not None]
        lines.append(
            [attempt, f"{rows[0]['step']} to {rows[-1]['step']}", _number(rows[0]["loss"], 4),
             _number(rows[-1]["loss"], 4), _number(validated[-1] if validated else None, 4), f"{rate:.0f}",
             _share(rate * flops / 1e12, peak)]
        )  # fmt: skip
    heads = ["attempt", "logged steps", "first loss", "last loss", "last held-out MLM loss", "tokens/s", "MFU"]
    for run in runs[-1:]:
        said = (
            f"Killed at step {run['killed_at']}, resumed after step {run.get('resumed_after')}, "
            f"{run.get('taken_again')} logged steps taken again with losses at most {run.get('difference')} apart, "
            f"ended at step {run['last_step']} with exit code {run['exit_code']}."
        )
        return [*_table(heads, lines), "", said]
    return _table(heads, lines)


def _launches(launches: list[Record]) -> list[str]:
    rows = []
    for first in (row for row in launches if row["rank"] == 0):
        words = ", ".join(f"{key}={value!r}" for key, value in first["values"].items())
        rows.append([first["product"], first["block"], _number(first["ms"], 4), f"`{first['config']}({words})`"])
    return _table(["product", "B", "ms over four shapes", "launch"], rows)


def _share(tflop_s: float, peak: float | None) -> str:
    return f"{tflop_s / peak:.1%}" if peak else ""
