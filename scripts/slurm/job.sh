# Sourced by the job scripts: their common part.

cd "${SLURM_SUBMIT_DIR:-.}"
[ -f scripts/env.sh ] || { echo "error: submit the job from the project's folder, not from $PWD" >&2; exit 2; }

DRY_RUN=
if [ "${1:-}" = --dry-run ]; then # print what would run; outside of SLURM, as the first of NODES nodes (1)
    DRY_RUN=1
    shift
    SLURM_JOB_ID=${SLURM_JOB_ID:-0}
    SLURM_NNODES=${SLURM_NNODES:-${NODES:-1}}
fi
export DRY_RUN
. scripts/env.sh

# Runs a job step. SLURM sends USR1 some minutes before the time limit, and TERM when it preempts; the step gets USR1 and
# time to save. A job that is then neither finished nor cancelled goes back into the queue.
run_step() {
    local step code signals=0 seen=-1
    [ -z "$DRY_RUN" ] || printf '%q ' "$@"
    [ -z "$DRY_RUN" ] || { echo; return; }
    trap 'signals=$((signals + 1)); scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM
    "$@" &
    step=$!
    while [ "$signals" -ne "$seen" ]; do # a signal ends `wait`, not the step
        seen=$signals code=0
        wait "$step" || code=$?
    done
    if [ "$code" -ne 0 ] && { [ "$signals" -gt 0 ] || [ "$code" -eq 75 ]; } && is_running; then
        echo "job $SLURM_JOB_ID goes back into the queue, and will continue where it was"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}

is_running() { scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; }
