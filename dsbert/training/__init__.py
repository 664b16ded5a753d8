"""A run: from the recipe to its last checkpoint.

pretrain         the loop
hooks            what happens after a step, in its order; soundness.py numbers that are not finite, saving.py
run              what a run is made of, opened part by part: agreement.py, streams.py
init_from        the weights of another model that a run may begin with; first_topologies.py where blocks stood at first
failures         how a run fails: who is told, what is recorded, and that every rank leaves
preflight        what is refused before any rank starts; ownership.py where another attempt is at work
numerics         what has changed of what moves bits
run_directory    the files of a run; attempts.py its records, history.py what they say, provenance.py
reporting        progress for people, records for machines; opening.py what is said before the first step
metrics          metrics.jsonl and its way to W&B; wandb_process.py, wandb_file.py, wandb_mode.py
evaluate         held-out losses, while training and by `dsbert evaluate`
"""
