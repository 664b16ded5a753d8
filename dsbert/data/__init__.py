"""Token shards to batches; preparing/ makes the shards.

    manifest        what a prepared data directory contains, and its identity
    shards          Arrow files of tokens, written once, memory-mapped by every rank
    tokenizer       what batches need of a tokenizer, and how it is saved and found; bert_tokenizer.py
    verification    whether what is read is what was written
    staging         a copy on a node's own disk
    spans           the numbered samples: runs of consecutive sentences of one document
    pairs           how samples become A and B, true and false, and look alike
    profiles        where a sample may be cut, and how its B then looks from outside
    matching        which samples may exchange their Bs
    token_kinds     what of a token can be seen without reading
    indices         arrays that are kept beside the data they follow from
    permutation     a shuffled order as a function and not as a table; order.py which sample stands where
    hashing         the only source of randomness here: a hash of who asks for what
    masking         whole-word masking of a batch
    stream          the batch that stands at any position of a job
    prefetch        batches made ahead of time by a thread

Nothing here keeps a generator's state: a batch is a function of the data, the seed and its position.
"""
