"""What a run does with a checkpoint that was published: it is recorded, and said."""

from __future__ import annotations

from contextlib import suppress

from dsbert.checkpoint.writer import Saved
from dsbert.training.run import Run


def finish_save(run: Run) -> None:
    """Wait for the save in flight, if there is one. Collective. Raises the same DsbertError on every rank."""
    note_saved(run, run.writer.finish())


def note_saved(run: Run, saved: Saved | None) -> None:
    """Record and say that a checkpoint was published, if one was."""
    if saved:
        if run.world.is_main:
            with suppress(OSError):  # what is saved is saved
                run.directory.note_saved(run.attempt, saved.path.name)
        run.reporter.say(f"saved step {saved.step}: {saved.nbytes / 1e6:.1f} MB in {saved.seconds:.2f} s")
