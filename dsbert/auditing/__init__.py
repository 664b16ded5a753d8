"""Is a checkpoint, or a run, all that it should be: every byte, and what the bytes mean. `dsbert verify`."""
