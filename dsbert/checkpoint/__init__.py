"""Checkpoints: sharded, whole or not there, readable at any world size and ZeRO stage.

A save, in its order:

1. `writer.CheckpointWriter.save`, on all ranks: they agree that they hold one topology and one set of weights; each
   copies its fragments (`fragments`: pieces of fp32 master, exp_avg and exp_avg_sq by parameter name, offset and
   length) into memory that every save reuses. Training goes on.
2. A thread of each rank (no collective): the file, under a name of the attempt; fsync; read back.
3. A later step's control message says that all threads are done, so that all ranks go on at the same step:
   a thread of rank 0 (`publisher.Publisher`) writes the manifest from what the ranks say they wrote, renames the
   directory, forces it to the disk, reads it back, and points `latest` to it.
4. Old checkpoints go, and nobody waits for that.

A load: `loading` lists what there is, has all ranks share the reading of the newest, takes the first of which every
byte verifies, and hands each rank the pieces that overlap its own shards. `restore` makes a model of one, without
ranks. `weight_source` reads what another run may begin with, also weights of transformers, and `initial_weights` gives
them to its model. `state` is what state.json and manifest.json hold.
"""
