"""Runs as pages and pictures: `dsbert report`, and `dsbert.Run` for notebooks and scripts.

run_report          the files of a report: a page, a picture each, numbers for scripts
run_pictures        losses, speed, cost, the time line of attempts
run_tables          runs, attempts, what recipes differ in, weights
topology_history    what became of blocks: by the journal of mask updates and the newest checkpoint
topology_pictures   the same, drawn; heat maps of where blocks stand
topology_films      where blocks stood at any update, and as an animation
api                 dsbert.Run
drawing             how all pictures look
web_page            an HTML page that needs no network; experiments use it as well
"""
