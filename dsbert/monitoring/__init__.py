"""How a run goes, and what it lost: from its files alone, on any machine that sees them, without torch.

run_files       the records of a run directory, read once
step_records    metrics.jsonl of them: sums that are read on from look to look, or columns
standing        what a run is at: waiting, at work, gone without a word, done
timeline        its attempts one after the other, what the steps took, what was lost
run_status      all of it in one record: `read_status`
card_peaks      what cards do at most, for MFU
status_lines    the same for people: one run as lines, many as a table
live            again and again, on a terminal
finding         the runs below a folder
"""
