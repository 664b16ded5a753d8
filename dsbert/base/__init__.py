"""What every other package may use, and which uses none of them.

errors           DsbertError and the exit codes
collectives      all_reduce, gather; what fails on one rank fails on all; exchange.py their log2 N messages
durable          files that are whole or not there; jsonl.py files of records, records.py what must stand in them
output           standard error that may vanish; progress.py bars, text_table.py tables
cores            how many this process may use
fields           kinds of values in what people write
splitmix64       hashes of integers, for random choices without state
optional_triton  keeps Triton out of processes that have no use for it
awake            a clock that stands still while the process does; own_time.py one for when a rank waits; malloc.py
"""
