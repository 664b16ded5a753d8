#!/usr/bin/env bash
# What pretrain.sbatch and sweep.sbatch share: run an attempt, then decide whether the job goes on, and say why.
#
#   time almost up, or `scancel --batch --signal=USR2 JOB`   the ranks save, the job is requeued and resumes
#   preemption (SLURM sends TERM to the ranks)               the same, within the partition's grace time
#   a rank was killed, lost a peer or hangs                  the ranks start again in this allocation, from the newest
#                                                            checkpoint; requeued where that has not helped
#   a disk is full or fails (exit 74)                        requeued: there may be room when it starts again
#   a node failed                                            SLURM requeues the job itself; with spare nodes as for a rank
#   three requeues without a newer checkpoint                given up
#   a mistake, a bug, no valid checkpoint (exit 2, 1, 4)     not requeued: it would only happen again
#   scancel JOB                                              ends, as asked
#
# It needs DSBERT, RECIPE (or FROZEN, the text of one), OVERRIDES, RUN_DIR (on a file system that all nodes share) and
# OPTIONS of `dsbert pretrain`. LAUNCH_PREFIX comes before dsbert, SRUN_ARGS behind srun. TASK_RUN_DIR: of one task of an
# array; by default RUN_DIR-TASK. SPARE_NODES: how many of the job's nodes the ranks leave free, for nodes that fail: one
# that SLURM has lost, or that failed twice, is left out of the next start. MAX_INSIDE: how often the ranks may start again
# in one allocation; 0: each time through the queue.

MAX_FRUITLESS=3
MAX_INSIDE=${MAX_INSIDE:-10}
# After so many in a row that brought no newer checkpoint, time and other nodes may do better. The second one waits first.
MAX_INSIDE_FRUITLESS=2
BACK_OFF_S=${BACK_OFF_S:-30}
# What must be left of the job's time: for a start, steps and a save.
LEAST_LEFT_S=600
# What srun returns where the ranks could not even be started again. Without that it would be 1, as of a bug in dsbert.
NOT_STARTED=71
PLACE_S=120 # how long srun may wait for nodes that are not rid of the ranks before
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

# The address of the first node that is used, which the other nodes may know no name for, by its name or by SLURM's books.
# Not one that means this node only, as 127.0.1.1, which Debian gives to a host's own name: rather none, and dsbert takes
# the name.
set_master_address() {
    local first name
    first=$(scontrol show hostnames "$used" | head -n 1)
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
        while kill -USR2 "$step" && sleep "$REPEAT_S"; do :; done >/dev/null 2>&1 & # nobody is to wait for it
        forwarder=$!
    fi
}

run_attempt() {
    # Left over in the shell that submitted, they would make every task a run of its own.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    # Since SLURM 22.05 a step does not take over the job's --cpus-per-task.
    [[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export DSBERT_START=$inside # an earlier one of this allocation is over, whatever is left of it
    set_master_address
    (
        trap '' USR2 # would kill an srun that is only starting
        ((inside)) && export SLURM_EXIT_ERROR=$NOT_STARTED SLURM_EXIT_IMMEDIATE=$NOT_STARTED &&
            place+=(--immediate="$PLACE_S")
        exec srun --kill-on-bad-exit=0 --wait="$LINGER_S" "${place[@]}" "${SRUN_ARGS[@]}" \
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
    step='' forwarder='' # a signal from here on has nobody to go to: another process may have the number soon
    status=$(own_status)
}

# How this very start ended, as the ranks recorded it; nothing where they did not. srun alone does not know: it may be
# killed, it reports the highest of several exit codes, and 0 where it lost a node.
own_status() {
    local status=''
    [[ -r $RUN_DIR/status.json ]] && status=$(<"$RUN_DIR/status.json")
    if [[ $status == *"\"job_id\": \"$SLURM_JOB_ID\","* && $status == *"\"restart_count\": $restart,"* ]] &&
        [[ $inside == 0 || $status == *"\"start\": $inside,"* ]]; then
        echo "$status"
    fi
}

# done, requeue, failed, or nothing.
outcome() {
    [[ $status =~ \"outcome\":\ \"([a-z]+)\" ]] && echo "${BASH_REMATCH[1]}"
}

# The exit code of the rank at fault, where it has ended by itself: srun reports the highest of all, which is that of ranks
# that have lost this one.
own_code() {
    [[ $status =~ \"culprit\":\ \{[^}]*\"code\":\ ([0-9]+) ]] && echo "${BASH_REMATCH[1]}"
}

# The nodes that the job has now: with --no-kill it keeps the others when SLURM loses one.
allocated() {
    local nodes=$SLURM_JOB_NODELIST
    [[ $record =~ \ NodeList=([^ ]+) ]] && nodes=${BASH_REMATCH[1]}
    scontrol show hostnames "$nodes"
}

# Where the ranks start: with spare nodes, on the first ones that have not failed twice. Fails where too few are left.
choose_nodes() {
    local node wanted chosen=()
    used=$SLURM_JOB_NODELIST place=()
    ((SPARE_NODES)) || return 0
    wanted=$((SLURM_JOB_NUM_NODES - SPARE_NODES))
    ((wanted > 0)) || return 1
    for node in $(allocated); do
        ((${#chosen[@]} < wanted && ${failures[$node]:-0} < 2)) && chosen+=("$node")
    done
    used=$(IFS=, && echo "${chosen[*]}")
    place=(--nodes="$wanted" --ntasks=$((wanted * SLURM_NTASKS_PER_NODE)) --nodelist="$used")
    ((${#chosen[@]} == wanted))
}

# Count against its node that a rank is at fault, where the ranks have named one.
note_failure() {
    local node host
    [[ $status =~ \"culprit\":\ \{[^}]*\"host\":\ \"([^\"]+)\" ]] || return 0
    host=${BASH_REMATCH[1]}
    for node in $(allocated); do
        [[ $node == "$host" || $node == "${host%%.*}" ]] && failures[$node]=$((${failures[$node]:-0} + 1))
    done
}

seconds_left() { # of the job's time, by its record
    if [[ $record =~ \ EndTime=([0-9][^ ]*) ]]; then
        echo $(($(date -d "${BASH_REMATCH[1]}" +%s) - $(date +%s)))
    else
        echo 1000000000
    fi
}

# Whether the ranks are to start again in this allocation, which takes no place in the queue. Waits if it is not the first
# time that nothing came of it.
starts_inside() {
    local pause_s=0 now
    case $rc in "$NOT_STARTED" | 1 | 2 | 4 | 74 | 75 | 130) return 1 ;; esac
    case $(own_code) in 1 | 2 | 4) return 1 ;; esac # its node has done nothing wrong
    [[ $(outcome) == requeue || $(outcome) == "done" ]] && return 1
    now=$(newest_checkpoint)
    if [[ $now > $before ]]; then
        inside_fruitless=0
    elif ((inside)); then
        inside_fruitless=$((inside_fruitless + 1)) pause_s=$BACK_OFF_S
    fi
    look_at_job
    [[ $record == *" JobState=RUNNING "*" Restarts=$restart "* && ! $record =~ \ PreemptTime=[0-9] ]] || return 1
    ((inside < MAX_INSIDE && inside_fruitless < MAX_INSIDE_FRUITLESS)) || return 1
    (($(seconds_left) >= LEAST_LEFT_S + pause_s)) || return 1
    note_failure
    choose_nodes || { say "too few nodes are left that have not failed twice: $used" && return 1; }
    if ((pause_s)); then # in the background: a trap waits for what runs in the foreground
        sleep "$pause_s" >/dev/null 2>&1 &
        wait $!
        kill $! 2>/dev/null
    fi
    ((asked || ended)) && return 1 # it is time to go, or SLURM ends the job
    inside=$((inside + 1)) before=$now
    say "a rank or a node failed, exit code $rc: starts again inside the allocation, time $inside, on $used from $now"
}

finish() { # $1: why; $2: the batch script's exit code
    say "$1"
    exit "$2"
}

look_at_job() { # what SLURM says of the job, times as `date` reads them
    record=$(SLURM_TIME_FORMAT=standard scontrol --oneliner show job "$job" 2>/dev/null)
}

requeue() { # $1: why; $2: 1 if it is SLURM's own wish
    local from
    look_at_job
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

asked=0 ended=0 inside=0 inside_fruitless=0 record='' step='' forwarder=''
declare -A failures=()
SPARE_NODES=${SPARE_NODES:-0}
check_programs
write_recipe
count_fruitless
trap forward USR2
trap 'ended=1 && write_ledger 1' TERM # SLURM ends the job, and has sent TERM to the ranks as well
if ((fruitless > MAX_FRUITLESS)); then
    finish "given up: $((fruitless - 1)) restarts brought no checkpoint newer than $newest" 1
fi
((SPARE_NODES)) && [[ ! ${SLURM_NTASKS_PER_NODE:-} ]] &&
    refuse "expected --ntasks-per-node beside SPARE_NODES, found none"
choose_nodes || refuse "expected more nodes than the $SPARE_NODES spare ones, found $SLURM_JOB_NUM_NODES"
say "starts on $used from $newest"
before=$newest
run_attempt
while starts_inside; do
    run_attempt
done
trap '' USR2 TERM # of the requeue below, which is counted as what it is

if ((rc == 75)) || [[ $(outcome) == requeue ]]; then
    requeue "saved" "$((!asked))" # a time limit too short to get anywhere counts; preemption does not
elif [[ $(outcome) == "done" ]]; then
    finish "done" 0
fi
# A mistake of one rank alone; an error of one rank alone (1) may be its node's, and goes through the queue.
case $(own_code) in 2 | 4) ((rc == 3)) && rc=$(own_code) ;; esac
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
requeue "a rank or a node failed, exit code $rc" "$ended"
