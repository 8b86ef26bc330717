# Functions for the .sbatch files, which source this file. docs/slurm.md says how to use them.
#
# Each .sbatch file runs twice. On a login node, started as a program, it checks its settings and submits itself, so that
# mistakes are found before it waits in the queue. In an allocation (sbatch or salloc) it runs. Settings are environment variables, which sbatch
# passes on. No command line is ever built as a string for a shell.

set -uo pipefail

die() {
    printf '%s: %s\n' "${SLURM_JOB_NAME:-${0##*/}}" "$*" >&2
    exit 2
}

# Print the value in YAML quotes, for --set.
quoted() {
    local quote="'"
    printf '%s' "'${1//$quote/$quote$quote}'"
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# Check the settings of all files, and the current folder. `compt slurm copy` writes slurm/ where there is no checkout.
check_common() {
    [[ -f slurm/common.sh ]] || die "$PWD has no slurm/common.sh; submit from the folder that has slurm/"
    [[ -z ${NODES:-} ]] || is_count "$NODES" || die "NODES='$NODES' should be a whole number above 0"
    [[ -z ${GPUS:-} ]] || is_count "$GPUS" || die "GPUS='$GPUS' (per node) should be a whole number above 0"
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
    fi
    command -v "$PYTHON" >/dev/null || die "PYTHON='$PYTHON' cannot be started"
}

# Check that there are training shards; set `chain` to the arguments of `compt chain`.
check_chain() {
    [[ -n ${DATA:-} ]] || die "DATA is missing: set it to the training shards, for example DATA='/data/cc3m/{00000..00331}.tar'"
    chain=("$RECIPE" --set "data.train=$(quoted "$DATA")")
    [[ -z ${RUN_DIR:-} ]] || chain+=(--run-folder "$RUN_DIR")
}

# Set `sets` to the --set options among the arguments for `compt chain`.
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

# Outside an allocation, submit this file: arguments before `--` are options of sbatch, the rest goes to the job.
submit_unless_allocated() {
    [[ -z ${SLURM_JOB_ID:-} ]] || return 0
    local options=() sets size=(--gpus "$((${NODES:-1} * ${GPUS:-8}))")
    find_sets "$@"
    [[ -z ${NODES:-} ]] || options+=(--nodes="$NODES")
    [[ -z ${GPUS:-} ]] || options+=(--gpus-per-node="$GPUS" --ntasks-per-node="$GPUS")
    while (($#)) && [[ $1 != -- ]]; do
        options+=("$1")
        [[ -z ${NODES:-} || ! $1 =~ ^(-N|--nodes) ]] || die "NODES=$NODES and $1; set only one of sbatch --nodes and NODES"
        # Another number of processes: check the recipe for a CPU, which needs no number.
        [[ ! $1 =~ ^(-N|-n|-G|--nodes|--ntasks|--gpus|--gres) ]] || size=(--set engine.device=cpu)
        shift
    done
    (($# == 0)) || shift
    command -v sbatch >/dev/null || die "sbatch is not installed here; submit from a login node of a Slurm cluster"
    # `compt plan` finds unknown keys, impossible chains, a missing decoder, and warns of data that is not here.
    if [[ ${#chain[@]} -gt 0 ]]; then
        "$PYTHON" -m compt plan "${chain[@]:0:3}" "${sets[@]}" "${size[@]}" --here >/dev/null || exit 2
    fi
    export DATA
    [[ -z ${RECIPE:-} ]] || export RECIPE
    exec sbatch --export=ALL "${options[@]}" "$0" "$@"
}

# sbatch does not read NODES. If this file was submitted by hand and NODES differs, requeue the job with that number of
# nodes, which ends this start of it.
take_nodes() {
    local id=${SLURM_JOB_ID:-} try
    [[ -n ${NODES:-} && $NODES != "${SLURM_JOB_NUM_NODES:-}" ]] || return 0
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] ||
        die "has ${SLURM_JOB_NUM_NODES:-} nodes, but NODES=$NODES; start the file as a program, or give sbatch --nodes without NODES"
    [[ ${SLURM_JOB_NUM_NODES:-1} == 1 && ${SLURM_RESTART_COUNT:-0} == 0 ]] ||
        die "has ${SLURM_JOB_NUM_NODES:-} nodes, but NODES=$NODES; set only one of sbatch --nodes and NODES"
    # The requeue ends this script after the cluster's KillWait: time to change and release the job.
    trap '' TERM
    echo "NODES=$NODES: requeue for that many nodes" >&2
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

# Requeue this job for the reason $1; returns only if Slurm refuses.
requeue() {
    # The name of an array task has its array and number.
    local id=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "$1; requeued, to resume from the checkpoint" >&2
    scontrol requeue "$id" && sleep 60
}

# Whether a node of the job is gone: it starts no processes. Slurm may take minutes to call it down, so the first three
# starts do not ask for that. Later starts do: another reason for the failing srun would requeue the job forever.
node_is_gone() {
    [[ $SLURM_JOB_NUM_NODES != 1 ]] || return 1
    ! timeout 60 srun --export=ALL --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" true || return 1
    ((${SLURM_RESTART_COUNT:-0} >= 3)) || return 0
    # A star means that the node does not respond.
    scontrol --oneliner show node "$SLURM_JOB_NODELIST" | grep -Eq ' State=[^ ]*(DOWN|FAIL|NOT_RESPONDING|\*)'
}

# Run the ranks, `step python …`, and end with their exit code. Before the time limit or a preemption (#SBATCH --signal)
# the ranks save and exit with 75, and the job is requeued. It is also requeued when a node is gone.
step() {
    local pid code late warned= ended=
    # srun no longer inherits this from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # sbatch computed the number of tasks for the first number of nodes, which take_nodes may have changed.
    local size=(--nodes="$SLURM_JOB_NUM_NODES")
    # In an allocation of salloc, the #SBATCH lines do not count, and srun would start one task on each node.
    local tasks=${SLURM_NTASKS_PER_NODE:-}
    [[ -n $tasks || -n ${SLURM_NTASKS:-} ]] || tasks=${GPUS:-8}
    [[ -z $tasks ]] || size+=(--ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks")
    # Python may take minutes to start from a network disk that no node has read yet.
    export COMPT_CONNECT_SECONDS=${COMPT_CONNECT_SECONDS:-300}
    # When a rank dies, the others have this many seconds to print what they saw before srun kills them.
    export SLURM_WAIT=${SLURM_WAIT:-120}
    # Without --export srun parses the list given to sbatch, and fails at blanks in it.
    srun --export=ALL "${size[@]}" "$@" &
    pid=$!
    trap 'warned=1; kill -USR1 "$pid" 2>/dev/null' USR1
    # Slurm sends TERM to every rank, before a requeue and at scancel.
    trap 'ended=1' TERM
    while
        wait "$pid"
        code=$?
        ((code > 128)) && kill -0 "$pid" 2>/dev/null
    do :; done
    # A signal may have ended `wait` just as the step ended. bash still has its exit code, or returns 127.
    wait "$pid" 2>/dev/null
    late=$?
    ((late == 127)) || code=$late
    # 138: USR1 came before Python had a handler for it.
    if [[ -n $warned && ($code == 75 || $code == 138) ]]; then
        requeue interrupted
    elif [[ $code != 0 && -z $ended ]] && node_is_gone 2>/dev/null; then
        requeue "a node no longer answers"
    fi
    exit "$code"
}
