"""The command `dsbert`.

app            its groups and options, from the first word of a command line to its exit code
training       dsbert pretrain
finetuning     dsbert finetune
cluster        dsbert plan, submit
monitoring     dsbert status, runs, watch, report, doctor
experiment     dsbert experiment
data           dsbert prepare, data
checkpoints    dsbert evaluate, export, inspect, diff, verify
parameters     what they share of click: kinds of values, examples
"""


def main() -> None:
    """The console script."""
    from dsbert.cli.app import main as run

    run()
