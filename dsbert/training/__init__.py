"""A run: from the recipe to its last checkpoint.

pretrain         the loop
run              what a run is made of, opened on all ranks, and how its failures end
preflight        what is refused before any rank starts; ownership.py where another attempt is at work
opening          what a run says first; numerics.py what has changed of what moves bits
run_directory    the files of a run: attempts, records, identity; history.py, provenance.py
reporting        progress for people, records for machines
metrics          metrics.jsonl and its way to W&B; wandb_process.py, wandb_file.py, wandb_mode.py
evaluate         held-out losses, while training and by `dsbert evaluate`
"""
