"""Bring docs/results.md up to date: the tables between its marks, and the pictures that it shows, from kept records.

    python tools/results.py [--check]

A mark is a line `<!-- FILE SIZE -->`, of an experiment in experiments/ and one of its sizes; what stands from there to
`<!-- end -->` is made anew. `dsbert experiment collect FILE --size SIZE --dir DIR --to experiments/records.jsonl` adds
to the records. --check writes nothing, and ends with 1 where a table is not what the records give.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from dsbert.experiment.definition import Experiment, load_experiment
from dsbert.experiment.planning import Plan, make_plan
from dsbert.experiment.plots import file_name, pictures
from dsbert.experiment.result_tables import as_text, main_tables, notes
from dsbert.training.provenance import NUMERICS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RECORDS = ROOT / "experiments" / "records.jsonl"
_MARKED = re.compile(r"<!-- (\S+\.yaml) (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_SHOWN = re.compile(r"\(results/([a-z0-9-]+\.svg)\)")


def tables(plan: Plan) -> str:
    """Of an experiment, in Markdown: arms, differences, and what a reader must know."""
    return "\n\n".join([*(as_text(table, "markdown") for table in main_tables(plan)), *notes(plan)])


def kept(experiment: Experiment) -> Plan:
    """What the records have of an experiment, of the one arithmetic that most of them are of, the newest of equals:
    results of different ones are not mixed."""
    with tempfile.TemporaryDirectory() as nothing:
        plans = [make_plan(experiment, Path(nothing), RECORDS, numerics) for numerics in range(NUMERICS, 0, -1)]
    return max(plans, key=lambda plan: len(plan.results))


def refreshed(page: str) -> tuple[str, dict[str, Plan]]:
    """The page with its tables made anew, and the plans that it shows, by name of file and size."""
    plans: dict[str, Plan] = {}

    def replace(mark: re.Match[str]) -> str:
        file, size = mark.groups()
        plan = kept(load_experiment(ROOT / "experiments" / file, size))
        plans[f"{Path(file).stem}-{size}"] = plan
        return f"<!-- {file} {size} -->\n{tables(plan)}\n<!-- end -->"

    return _MARKED.sub(replace, page), plans


def draw(page: str, plans: dict[str, Plan], to: Path) -> None:
    """The pictures that the page shows, named after their experiment, its size and their title."""
    wanted = set(_SHOWN.findall(page))
    to.mkdir(exist_ok=True)
    for name, plan in plans.items():
        if any(file.startswith(name) for file in wanted):
            for title, svg in pictures(plan).items():
                file = f"{name}-{file_name(title)}"
                if file in wanted:
                    (to / file).write_text(svg, encoding="utf-8")
                    wanted.discard(file)
    if wanted:
        raise SystemExit(f"{PAGE} shows pictures that no experiment has: {', '.join(sorted(wanted))}")


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after, plans = refreshed(before)
    if options.check:
        if after != before:
            print(f"{PAGE} does not show what {RECORDS} gives: run tools/results.py", file=sys.stderr)
            raise SystemExit(1)
        return
    PAGE.write_text(after, encoding="utf-8")
    draw(after, plans, PAGE.with_suffix(""))


if __name__ == "__main__":
    main()
