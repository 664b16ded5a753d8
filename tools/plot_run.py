"""Draw a run: loss, held-out loss and learning rate; explored degrees of freedom and pruned blocks, over the steps.

    python tools/plot_run.py runs/demo --to docs/demo.png [--unigram 6.20]

Needs matplotlib (pip install 'dsbert[plot]').
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsbert.reports.run_pictures import ReportedRun


def draw(run: ReportedRun, to: Path, unigram: float | None) -> None:
    """Two panels beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    left.plot(*run.series("loss_mlm"), color="0.7", linewidth=1, label="training MLM loss")
    left.plot(*run.series("val_mlm_loss"), "o-", color="C0", label="held-out MLM loss")
    if unigram is not None:
        left.axhline(unigram, color="C3", linestyle="--", linewidth=1, label="unigram cross-entropy")
    left.set(xlabel="step", ylabel="nats per masked token", title="loss")
    left.legend(frameon=False)
    right.plot(*run.series("dof"), color="C2", label="explored degrees of freedom")
    right.plot(*run.series("density"), color="C1", label="density: constant")
    right.set(xlabel="step", ylabel="share of the encoder's weights", ylim=(0, 1), title="pattern")
    right.legend(frameon=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


def main() -> None:
    """Read a run and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--unigram", type=float, help="drawn as a line: `dsbert evaluate RUN` prints it")
    options = parser.parse_args()
    draw(ReportedRun.read(options.run), options.to, options.unigram)


if __name__ == "__main__":
    main()
