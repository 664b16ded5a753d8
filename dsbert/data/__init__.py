"""Text to batches: documents -> sentences -> tokenizer -> token shards -> spans -> masked batches.

Preparing, in the order of the work:

    sources.py      what a SOURCE is: files, tables, data sets, packages
    folders.py      which files of a folder are read, and why the others are not; kinds.py what a file's name says
    grouping.py     which rows of a source make a document
    lines.py        lines of plain and packed text from any offset; unpacking.py
    records.py      the text in rows of JSON lines and CSV; tables.py of parquet and data sets
    pieces.py       what one worker reads in about a second
    corpus.py       documents; which are held out; sentences.py their sentences, whatever the text is
    prepare.py      `dsbert prepare`: four passes over pieces, and what rank 0 decides between them
    options.py      how a preparation is to be made
    crew.py         the ranks and their queue; workers.py, worker.py the processes of one rank
    plan.py         pieces by names that follow from their content; marks.py what was done and is whole
    spool.py        cleaned documents between the passes
    folding.py      what copies have in common, and texts that must not be parted
    scripts.py      words of scripts without spaces
    decisions.py    copies and splits; near_duplicates.py MinHash
    learning.py     the tokenizer of a preparation; wordpiece.py trains a vocabulary whose ids are always the same;
    tokenizer.py    what batches need of a tokenizer, and how it is saved and found;
                    alphabet.py the characters that it spells
    encoding.py     text to ids, word by word; tokenizer_check.py that transformers gives the same ones
    merging.py      encoded pieces, and shards out of them; assembly.py the directory
    manifest.py     what a prepared data directory contains, and its identity
    inspection.py   `dsbert data`

Reading:

    shards.py       Arrow files of tokens, written once, memory-mapped by every rank
    verification.py whether what is read is what was written
    staging.py      a copy on a node's own disk
    spans.py        the numbered samples: runs of consecutive sentences of one document
    pairs.py        how samples become A and B, true and false, and look alike
    profiles.py     where a sample may be cut, and how its B then looks from outside
    matching.py     which samples may exchange their Bs
    token_kinds.py  what of a token can be seen without reading
    indices.py      arrays that are kept beside the data they follow from
    permutation.py  a shuffled order as a function and not as a table; order.py which sample stands where
    hashing.py      the only source of randomness here: a hash of who asks for what
    masking.py      whole-word masking of a batch
    stream.py       the batch that stands at any position of a job
    streaming.py    batches from a source that was not prepared
    prefetch.py     batches made ahead of time by a thread

Nothing here keeps a generator's state: a batch is a function of the data, the seed and its position.
"""
