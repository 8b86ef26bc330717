# What the .sbatch files beside it share; they source it. docs/slurm.md says how they are used.
#
# A file runs twice. On a login node, started as a program, it checks what it was given and hands itself to sbatch, so
# that a mistake never queues. Within an allocation, batch or salloc, it runs. Settings are environment variables, which
# sbatch passes on; nothing is ever put together into a line for a shell.

set -uo pipefail

die() {
    printf '%s: %s\n' "${SLURM_JOB_NAME:-${0##*/}}" "$*" >&2
    exit 2
}

# The value in quotes of YAML, for --set.
quoted() {
    local quote="'"
    printf '%s' "'${1//$quote/$quote$quote}'"
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# Settings that all files take, and where this has to be started.
check_common() {
    [[ -f launchers/train.py && -f slurm/common.sh ]] || die "$PWD is not compt's checkout; submit from its top folder"
    [[ -z ${NODES:-} ]] || is_count "$NODES" || die "NODES='$NODES' should be a whole number above 0"
    [[ -z ${GPUS:-} ]] || is_count "$GPUS" || die "GPUS='$GPUS', those of a node, should be a whole number above 0"
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
    fi
    command -v "$PYTHON" >/dev/null || die "PYTHON='$PYTHON' cannot be run"
}

# A recipe and its training shards, which come back in `chain` as arguments of `compt chain`.
check_chain() {
    [[ -n ${DATA:-} ]] || die "DATA is missing: the training shards, as in DATA='/data/cc3m/{000..331}.tar'"
    [[ -r $RECIPE ]] || die "RECIPE='$RECIPE' cannot be read"
    chain=("$RECIPE" --set "data.train=$(quoted "$DATA")")
    [[ -z ${RUN_DIR:-} ]] || chain+=(--run-folder "$RUN_DIR")
}

# The --set options among the file's arguments for `compt chain`, which come back in `sets`.
find_sets() {
    sets=()
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        while (($#)) && [[ $1 != -- ]]; do shift; done
    fi
    while (($#)); do
        if [[ $1 == --set && $# -gt 1 ]]; then
            sets+=("$1" "$2")
            shift
        elif [[ $1 == --set=* ]]; then
            sets+=("$1")
        fi
        shift
    done
}

# Outside of an allocation: submit this file with the arguments before `--` as options of sbatch; the rest is for the job.
submit_unless_allocated() {
    [[ -z ${SLURM_JOB_ID:-} ]] || return 0
    local options=() sets size=(--gpus "$((${NODES:-1} * ${GPUS:-8}))")
    find_sets "$@"
    [[ -z ${NODES:-} ]] || options+=(--nodes="$NODES")
    [[ -z ${GPUS:-} ]] || options+=(--gpus-per-node="$GPUS" --ntasks-per-node="$GPUS")
    while (($#)) && [[ $1 != -- ]]; do
        options+=("$1")
        # How many processes that makes is not worked out here; on a CPU a plan does not ask.
        [[ ! $1 =~ ^(-N|-n|-G|--nodes|--ntasks|--gpus|--gres) ]] || size=(--set engine.device=cpu)
        shift
    done
    (($# == 0)) || shift
    command -v sbatch >/dev/null || die "there is no sbatch here; submit from a login node of a Slurm cluster"
    # The recipe as a whole, as `compt plan` sees it: unknown keys and impossible chains end here.
    if [[ ${#chain[@]} -gt 0 ]]; then
        "$PYTHON" -m compt plan "${chain[@]:0:3}" "${sets[@]}" "${size[@]}" >/dev/null || exit 2
    fi
    export DATA
    [[ -z ${RECIPE:-} ]] || export RECIPE
    exec sbatch --export=ALL "${options[@]}" "$0" "$@"
}

# `sbatch` itself does not read NODES. Where it was typed, and the number is another, the job goes back to the queue
# for that many; this ends it.
take_nodes() {
    local id=${SLURM_JOB_ID:-} try
    [[ -n ${NODES:-} && $NODES != "${SLURM_JOB_NUM_NODES:-}" ]] || return 0
    [[ ${SLURM_JOB_NUM_NODES:-1} == 1 && ${SLURM_RESTART_COUNT:-0} == 0 && -z ${SLURM_ARRAY_JOB_ID:-} ]] ||
        die "has ${SLURM_JOB_NUM_NODES:-} nodes, but NODES=$NODES; give one of sbatch --nodes and NODES, or the same"
    # The requeue ends this script within the cluster's KillWait; until then it changes and releases the job.
    trap '' TERM
    echo "NODES=$NODES: back to the queue for that many nodes" >&2
    scontrol requeuehold "$id" || die "sbatch gave 1 node, but NODES=$NODES; submit with sbatch --nodes=$NODES"
    for try in 1 2 3 4 5; do
        if scontrol update JobId="$id" NumNodes="$NODES-$NODES" 2>/dev/null; then
            scontrol release "$id"
            exit 0
        fi
        sleep 1
    done
    scancel "$id"
    die "sbatch gave 1 node, but NODES=$NODES; submit with sbatch --nodes=$NODES"
}

# Send this job back to the queue, as $1 says why; returns only where Slurm does not.
requeue() {
    # An array task is named by its array and number.
    local id=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "$1; back to the queue, to go on from the checkpoint" >&2
    scontrol requeue "$id" && sleep 60
}

# Whether a node of the job is gone: it starts no processes, and Slurm calls it down. Slurm may take minutes for that, and
# is not waited for in a job's first three starts; later ones would repeat what is wrong with something else for ever.
node_is_gone() {
    [[ $SLURM_JOB_NUM_NODES != 1 ]] || return 1
    ! timeout 60 srun --export=ALL --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" true || return 1
    ((${SLURM_RESTART_COUNT:-0} >= 3)) || return 0
    # The star says that it does not respond.
    scontrol --oneliner show node "$SLURM_JOB_NODELIST" | grep -Eq ' State=[^ ]*(DOWN|FAIL|NOT_RESPONDING|\*)'
}

# Run one step of ranks, `step python …`, and end with its exit code. Where the time limit or a preemption is announced
# (#SBATCH --signal), the ranks save and exit with 75, and the job goes back to the queue; so it does without a node.
step() {
    local pid code late told= ended=
    # srun no longer takes this over from sbatch by itself.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # The number of tasks that sbatch worked out is that of the nodes at first, which take_nodes may have changed.
    local size=(--nodes="$SLURM_JOB_NUM_NODES")
    [[ -z ${SLURM_NTASKS_PER_NODE:-} ]] || size+=(--ntasks="$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))")
    # So long may the other ranks of one that died say what they saw, before srun ends them.
    export SLURM_WAIT=${SLURM_WAIT:-120}
    # Without --export it reads the list that sbatch was given, and stumbles over blanks in it.
    srun --export=ALL "${size[@]}" "$@" &
    pid=$!
    trap 'told=1; kill -USR1 "$pid" 2>/dev/null' USR1
    # Slurm itself sends TERM to every rank, before a requeue and with scancel.
    trap 'ended=1' TERM
    while
        wait "$pid"
        code=$?
        ((code > 128)) && kill -0 "$pid" 2>/dev/null
    do :; done
    # A signal may have ended `wait` just as the step itself ended; bash still knows how, or says 127.
    wait "$pid" 2>/dev/null
    late=$?
    ((late == 127)) || code=$late
    # 138: announced before Python could listen.
    if [[ -n $told && ($code == 75 || $code == 138) ]]; then
        requeue interrupted
    elif [[ $code != 0 && -z $ended ]] && node_is_gone 2>/dev/null; then
        requeue "a node no longer answers"
    fi
    exit "$code"
}
