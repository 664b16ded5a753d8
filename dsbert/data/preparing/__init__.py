"""Text to token shards: documents -> sentences -> tokenizer -> shards.

In the order of the work:

    sources           what a SOURCE is: files, tables, data sets, packages
    folders           which files of a folder are read, and why the others are not; kinds.py what a file's name says
    grouping          which rows of a source make a document
    lines             lines of plain and packed text from any offset; unpacking.py
    parsing           the text in rows of JSON lines and CSV; tables.py of parquet and data sets
    pieces            what one worker reads in about a second
    corpus            documents; sentences.py their sentences, whatever the text is
    prepare           `dsbert prepare`: four passes over pieces, and what rank 0 decides between them
    options           how a preparation is to be made
    work_queue        the queue of tasks that all ranks take from; tasks.py tasks and how they fail
    worker_pool       the processes of one rank; worker.py what each of them does
    plan              pieces by names that follow from their content; done_markers.py what was done and is whole
    spool             cleaned documents between the passes
    folding           what copies have in common, and texts that must not be parted
    scripts           words of scripts without spaces
    split_assignment  copies and splits; near_duplicates.py MinHash
    learning          the tokenizer of a preparation; wordpiece.py trains a vocabulary whose ids are always the same;
                      alphabet.py the characters that it spells
    encoding          text to ids, word by word; tokenizer_check.py that transformers gives the same ones
    merging           encoded pieces, and shards out of them; assembly.py the directory
    streaming         samples of texts that were not prepared

Nothing outside of here but `evaluate --text` and the command line needs any of it.
"""
