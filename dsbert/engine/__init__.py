"""Training steps through DeepSpeed, and the only place that knows its memory.

train_engine     the batch of a step shared out, forward, backward, optimizer; the rate of each step
micro_batches    how a global batch is cut
replay           a gradient computed twice, by two ranks, to find one that computes wrongly
step_message     what ranks tell each other of a step; step_result.py what it has come to
step_guard       steps that are not finite are skipped by all ranks
ds_engine        DeepSpeed's engine, made; ds_config.py its JSON, ds_schema.py which keys it may have
shard_editor     how the mask manager reaches weights and moments
zero_shards      where a parameter's master, moments and copies lie at each ZeRO stage
layout_proof     that DeepSpeed trains what zero_shards reads and writes, shown before the first step
"""
