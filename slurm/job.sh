#!/usr/bin/env bash
# What pretrain.sbatch and sweep.sbatch share: run one attempt, then decide whether the job goes on, and say why.
#
#   time almost up, or `scancel --batch --signal=USR2 JOB`   the ranks save, the job is requeued and resumes
#   preemption (SLURM sends TERM to the ranks)               the same, within the partition's grace time
#   a rank was killed, lost a peer or hangs                  requeued: resumes from the newest checkpoint
#   a disk is full or fails (exit 74)                        the same: there may be room when it starts again
#   a node failed                                            SLURM requeues the job itself
#   three restarts without a newer checkpoint                given up
#   a mistake, a bug, no valid checkpoint (exit 2, 1, 4)     not requeued: it would only happen again
#   scancel JOB                                              ends, as asked
#
# It needs DSBERT, RECIPE (or FROZEN, the text of one), OVERRIDES, RUN_DIR (on a file system that all nodes share) and
# OPTIONS of `dsbert pretrain`. LAUNCH_PREFIX comes before dsbert, SRUN_ARGS behind srun. TASK_RUN_DIR: of one task of an
# array; by default RUN_DIR-TASK.

MAX_FRUITLESS=3
# Seconds that the other ranks may run on once the first has ended: they name the culprit, or finish W&B's upload. This
# is why there is no --kill-on-bad-exit: it would kill them at once, and srun would report that instead of their code.
LINGER_S=120
REPEAT_S=20

restart=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    # The job id of one task of an array is the whole array's: signals and requeues must not go there.
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    RUN_DIR=${TASK_RUN_DIR:-$RUN_DIR-$SLURM_ARRAY_TASK_ID}
fi
ledger=$RUN_DIR/slurm-restarts

say() {
    echo "job $job, restart $restart: $*"
}

refuse() { # $1: what is missing. In the first second, once, and before any rank starts.
    say "not started: $1"
    exit 2
}

check_programs() {
    local program
    for program in srun "${LAUNCH_PREFIX[@]:0:1}" "${DSBERT[0]}"; do
        [[ ${LAUNCH_PREFIX[*]} && $program == "${DSBERT[0]}" ]] && continue # the prefix knows where it is
        command -v "$program" >/dev/null ||
            refuse "expected $program on the PATH of $(hostname), found none: activate its environment before sbatch, or \
name it by its path in the settings of this script"
    done
}

write_recipe() {
    [[ ${FROZEN:-} ]] || return 0
    RECIPE=$RUN_DIR/recipe-$job.yaml
    { mkdir -p "$RUN_DIR" && printf '%s' "$FROZEN" >"$RECIPE.tmp" && mv "$RECIPE.tmp" "$RECIPE"; } ||
        refuse "expected to write the recipe to $RECIPE"
}

newest_checkpoint() {
    local path newest=none # which sorts before every step
    for path in "$RUN_DIR"/checkpoints/step_[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]; do
        [[ -d $path ]] && newest=${path##*/}
    done
    echo "$newest"
}

# How many restarts in a row have brought no newer checkpoint. Those that are SLURM's own wish do not count.
count_fruitless() {
    local old_job old_newest old_count old_planned
    fruitless=0
    newest=$(newest_checkpoint)
    if ((restart)) && [[ -r $ledger ]] && read -r old_job old_newest old_count old_planned <"$ledger"; then
        if [[ $old_job == "$SLURM_JOB_ID" && ! $newest > $old_newest ]]; then
            fruitless=$((old_count + (old_planned ? 0 : 1)))
        fi
    fi
    write_ledger 0
}

write_ledger() { # $1: 1 if the next restart is SLURM's own wish
    mkdir -p "$RUN_DIR" && echo "$SLURM_JOB_ID $newest $fruitless $1" >"$ledger.tmp" && mv "$ledger.tmp" "$ledger"
}

# The first node's address, which the other nodes may know no name for, by its name or by SLURM's books. Not one that means
# this node only, as 127.0.1.1, which Debian gives to a host's own name: rather none, and dsbert takes the name.
set_master_address() {
    local first name
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    for name in "$first" "$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"; do
        MASTER_ADDR=$(getent ahostsv4 "$name" | awk '$1 !~ /^127\./ { print $1; exit }')
        [[ $MASTER_ADDR ]] && export MASTER_ADDR && return
    done
    unset MASTER_ADDR
}

# The step is signalled through its srun: that needs neither the controller nor an id, which may be a whole array's. Again
# and again, for srun drops what comes before its tasks run, and the ranks mind no second one.
forward() {
    asked=1
    if [[ $step && ! $forwarder ]]; then
        while kill -USR2 "$step" && sleep "$REPEAT_S"; do :; done 2>/dev/null &
        forwarder=$!
    fi
}

run_attempt() {
    # Left over in the shell that submitted, they would make every task a run of its own.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    # Since SLURM 22.05 a step does not take over the job's --cpus-per-task.
    [[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    (
        trap '' USR2 # would kill an srun that is only starting
        exec srun --kill-on-bad-exit=0 --wait="$LINGER_S" "${SRUN_ARGS[@]}" \
            "${LAUNCH_PREFIX[@]}" "${DSBERT[@]}" pretrain "$RECIPE" "${OVERRIDES[@]}" --run-dir "$RUN_DIR" "${OPTIONS[@]}"
    ) &
    step=$!
    ((asked)) && forward # the signal came before there was a step
    wait "$step"
    while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not the step
        wait "$step"
    done
    wait "$step" # bash remembers the exit code
    rc=$?
    [[ $forwarder ]] && kill "$forwarder"
}

# How this very start ended, as the ranks recorded it: done, requeue, failed, or nothing. srun alone does not know: it may
# be killed, it reports the highest of several exit codes, and 0 where it lost a node.
recorded_outcome() {
    local status=''
    [[ -r $RUN_DIR/status.json ]] && status=$(<"$RUN_DIR/status.json")
    if [[ $status == *"\"job_id\": \"$SLURM_JOB_ID\","* && $status == *"\"restart_count\": $restart,"* &&
        $status =~ \"outcome\":\ \"([a-z]+)\" ]]; then
        echo "${BASH_REMATCH[1]}"
    fi
}

finish() { # $1: why; $2: the batch script's exit code
    say "$1"
    exit "$2"
}

requeue() { # $1: why; $2: 1 if it is SLURM's own wish
    local record from
    record=$(scontrol --oneliner show job "$job" 2>/dev/null)
    # Preempted, or on a node that SLURM has lost and that runs on, with this shell on it, beside the job's next start.
    if [[ $record && $record != *" Restarts=$restart "* ]]; then
        finish "$1, and SLURM has requeued the job already: left to SLURM" 143
    elif [[ $record && ! $record =~ JobState=RUNNING|Reason=TimeLimit ]]; then # scancel, for one
        [[ $record =~ JobState=([A-Z_]+) ]]
        finish "$1, and for SLURM the job is ${BASH_REMATCH[1]}: left to SLURM" 143
    fi
    write_ledger "$2"
    from=$(newest_checkpoint)
    [[ $from == none ]] && from="the start: there is no checkpoint yet"
    say "$1: requeued, to go on from $from"
    scontrol requeue "$job" || say "scontrol requeue failed: left to the site's RequeueExit; else submit again"
    exit 75 # requeues where the site says RequeueExit=75; a job that is requeued already stays so
}

asked=0 step='' forwarder=''
check_programs
write_recipe
count_fruitless
trap forward USR2
trap 'write_ledger 1' TERM # SLURM ends the job, and has sent TERM to the ranks as well
if ((fruitless > MAX_FRUITLESS)); then
    finish "given up: $((fruitless - 1)) restarts brought no checkpoint newer than $newest" 1
fi
set_master_address
say "starts on $SLURM_JOB_NODELIST from $newest"
run_attempt
trap '' USR2 TERM # of the requeue below, which is counted as what it is

outcome=$(recorded_outcome)
if ((rc == 75)) || [[ $outcome == requeue ]]; then
    requeue "saved" "$((!asked))" # a time limit too short to get anywhere counts; preemption does not
elif [[ $outcome == "done" ]]; then
    finish "done" 0
fi
case $rc in
1) finish "not requeued: internal error, exit code 1" 1 ;;
2) finish "not requeued: the run was refused, exit code 2" 2 ;;
4) finish "not requeued: no valid checkpoint, exit code 4" 4 ;;
130) finish "not requeued: interrupted, exit code 130" 130 ;;
esac
if ((fruitless >= MAX_FRUITLESS)) && [[ ! $(newest_checkpoint) > $newest ]]; then
    finish "given up: exit code $rc, and $fruitless restarts brought no checkpoint newer than $newest" "$((rc ? rc : 1))"
fi
((rc == 137)) && say "KILL, which the kernel sends where memory runs out: lower batch.micro_batch, or ask for more --mem"
((rc == 74)) && requeue "a file system is full or fails, exit code 74" 0
requeue "a rank or a node failed, exit code $rc" 0
