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
metrics          where records go beside metrics.jsonl: W&B and TensorBoard
follower         their processes, from the run's side; record_stream.py from theirs: wandb_process.py,
                 tensorboard_process.py; topology_media.py pictures and histograms of mask updates
wandb_run        what W&B is told of a run; wandb_mode.py, wandb_file.py offline, wandb_sync.py `dsbert wandb-sync`
evaluate         held-out losses, while training and by `dsbert evaluate`
"""
