"""Text to batches: documents -> sentences -> tokenizer -> token shards -> spans -> masked batches.

    corpus.py       a source's text as documents, each a list of sentences; which documents are for validation
    tokenizer.py    a BERT WordPiece vocabulary whose ids are the same on every training
    manifest.py     what a prepared data directory contains, and its identity
    shards.py       Arrow files of tokens, written once, memory-mapped by every rank
    prepare.py      `dsbert prepare`: all of the above, atomically
    spans.py        the numbered samples: runs of consecutive sentences of one document
    permutation.py  the order of an epoch, as a function and not as a table
    hashing.py      the only source of randomness here: a hash of who asks for what
    masking.py      whole-word masking of a batch
    stream.py       the batch that stands at any position of a job
    prefetch.py     batches made ahead of time by a thread

Nothing here keeps a generator's state: a batch is a function of the data, the seed and its position.
"""
