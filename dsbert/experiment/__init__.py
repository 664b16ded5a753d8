"""`dsbert experiment`: a matrix of runs from one file, and what follows from it. Nothing else of dsbert knows of it.

definition          what a file declares: a base recipe, arms, a grid, seeds, what is swept
cells               the runs that follow: one cell is one recipe, named by the hash of all that moves its result
planning            which cells are trained, which are wanted next, and which value of a sweep is the best
cell_results        what a cell's run directory says: losses, FLOPs, seconds
runner              trains what is missing on this machine; several callers share the work; commands.py
watching            how far the cells are that are at work
array_jobs          the same as SLURM array jobs
timing              how long it will take, from a few steps
paired_statistics   means, intervals, differences paired by seed
result_tables       tables for terminals, Markdown, LaTeX and CSV
plots               curves; page.py one HTML page that needs no network
"""
