"""What a checkpoint, a run or prepared data holds, for people and scripts. Nothing here trains.

    summary             `dsbert inspect`
    comparison          `dsbert diff`
    topologies          where blocks stood after any step, by the journal of mask updates
    data_summary        `dsbert data`
    doctor              `dsbert doctor`: whether a machine can train; doctor_storage.py what its file systems do

`dsbert verify`, whether everything is what it should be, every byte and what the bytes mean:

    audit_run           a run directory, or whatever a path leads to
    audit_checkpoint    a checkpoint; audit_content what its tensors mean
    audit_records       attempts, metrics and mask updates of a run
    audit_data          prepared data
    special_files       pipes, devices and holes, which must not hold anybody up
"""
