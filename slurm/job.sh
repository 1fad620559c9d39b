# Sourced by the .sbatch files: what happens to a job from its start to its end. Nothing here is of a machine.
#
#   begin MEASURE...         environment, ranks and threads from the allocation, and a look at whether they form one job
#   run MODULE ARGUMENTS     run it on all ranks; a signal that the job gets reaches it
#   end ARGUMENTS            leave with its exit code, or go on in the same job or a new one
#
# A program that was interrupted leaves with 75, or is ended by the signal it was sent. It goes on only if MEASURE, a
# command that prints a number, prints a larger one than when the job began: what makes no progress would go on for ever.
set -Eeuo pipefail
trap 'echo "slurm/job.sh: line $LINENO failed" >&2' ERR # none of these commands should; that one did must not be a riddle

INTERRUPTED=75 # of sysexits.h: the same command may succeed later
# 4(x2),3 is 4 on each of two nodes and 3 on another.
RANKS=${SLURM_NTASKS:-$(tr , '\n' <<<"$SLURM_TASKS_PER_NODE" | awk -F '[(x)]+' '{n += $1 * ($2 ? $2 : 1)} END {print n}')}
THREADS=${SLURM_CPUS_PER_TASK:-1}
# One task of an array, where the number of the job alone would name all of them.
JOB=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
CONTINUATIONS=$((${SLURM_RESTART_COUNT:-0} + ${HPCDEQ_LINKS:-0}))

say() { echo "[$(date +%FT%T) job $JOB] $*"; }
refuse() {
    say "refused: $*" >&2
    exit 2
}

option() { # NAME ARGUMENTS...: print the value of an option on a command line; fail if it is not there
    local name=$1 word value= found=1
    shift
    while [ $# -gt 0 ]; do
        word=$1
        shift
        case $word in
        "$name"=*) value=${word#*=} found=0 ;;
        "$name") value=${1:-} found=0 ;;
        esac
    done
    printf '%s' "$value"
    return $found
}

fact() { # NAME: what Slurm knows of this job
    timeout 20 scontrol show job "$JOB" | grep -oP "(?<= )$1=\K[^ ]*" | head -n 1 || true
}

work() { # DIR: samples that its run has evaluated, by the header of what it could be continued from
    local file told most=0
    for file in "$1"/checkpoint.h5 "$1"/checkpoint-previous.h5; do
        told=$(head -c 512 "$file" 2>/dev/null | sed -n 's/^work \([0-9][0-9]*\)$/\1/p' || true)
        [ "${told:-0}" -le "$most" ] || most=$told
    done
    echo "$most"
}

given() { # OPTION VALUE...: the options whose values are there
    while [ $# -gt 1 ]; do
        case $2 in '' | '(null)' | None) ;; *) printf '%s=%s ' "$1" "$2" ;; esac
        shift 2
    done
}

same_size() { # what this job was given, as options of sbatch
    given --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$RANKS" --cpus-per-task "${SLURM_CPUS_PER_TASK:-}" \
        --ntasks-per-node "${SLURM_NTASKS_PER_NODE:-}" --mem "${SLURM_MEM_PER_NODE:-}" --mem-per-cpu "${SLURM_MEM_PER_CPU:-}" \
        --gres "$(fact TresPerNode | sed 's/gres://g')" --constraint "$(fact Features)" --time "$(fact TimeLimit)"
}

submit() { # OPTIONS... SCRIPT ARGUMENTS...: another job like this one; print its number
    local name place account quality
    place=$(fact Partition) account=$(fact Account) quality=$(fact QOS)
    # This job's own variables would be taken for the other's where it has none.
    for name in $(compgen -e | grep -E '^(SLURM|SRUN)_' | grep -vx SLURM_CONF); do unset "$name"; done
    timeout 60 sbatch --parsable $(given --partition "$place" --account "$account" --qos "$quality") "$@"
}

# A signal may come at any time, also before there is a program to hand it to.
SIGNAL=
ARRIVED=0
PROGRAM=
TOLD=false  # the program
ENDED=false # the job, by Slurm
arrive() { # SIGNAL
    SIGNAL=$1
    ARRIVED=$((ARRIVED + 1))
    [ "$SIGNAL" != TERM ] || why_terminated
    # Slurm tells the ranks, too, when it ends a job. Otherwise the signal is handed on as USR1, which mpirun and srun
    # both give to all ranks; by TERM they would end them. Once: a program that gets a second one ends without more ado.
    if ! $ENDED && ! $TOLD && [ -n "$PROGRAM" ]; then
        TOLD=true
        kill -USR1 "$PROGRAM" 2>/dev/null || true
    fi
}
trap 'arrive USR1' USR1
trap 'arrive TERM' TERM

why_terminated() { # Slurm's state of the job tells: its time is up, or it makes room for another; it was cancelled; or neither
    local patience
    case $(fact JobState):$(fact Reason):$(fact PreemptTime) in
    TIMEOUT:* | *:TimeLimit:* | PREEMPTED:* | *:[0-9]*) SIGNAL=TIMEOUT ENDED=true ;;
    CANCELLED:* | COMPLETING:*) ENDED=true ;;
    esac
    if $ENDED && [ -n "$PROGRAM" ]; then
        # Slurm kills what is left after KillWait: half of that time is for the program, half for what this script does then.
        patience=$(timeout 20 scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
        (
            sleep $((${patience:-30} / 2))
            kill -KILL "$PROGRAM"
        ) >/dev/null 2>&1 &
    fi
}

begin() { # MEASURE...
    MEASURE=("$@")
    # The file that Slurm was given; what runs is a copy of it elsewhere.
    SCRIPT=$HPCDEQ_SLURM/$(timeout 20 scontrol show job "$JOB" | grep -oP '^ *Command=\K.*?\.sbatch' | sed 's|.*/||') ||
        refuse "scontrol show job $JOB does not name the file that was submitted: submit one of slurm/*.sbatch"
    set +u # modules and environments are seldom written for it
    source "$HPCDEQ_SLURM/env.sh"
    set -u
    # By its full name: in a job Open MPI puts the folder of its own programs before all others.
    PYTHON=$(command -v python) || refuse "there is no python on the path: see slurm/env.sh"
    export OMP_NUM_THREADS=$THREADS
    say "$SLURM_JOB_NAME on $SLURM_JOB_NODELIST: $RANKS ranks of $THREADS threads by $HPCDEQ_LAUNCHER, bound: $HPCDEQ_BIND," \
        "continuation $CONTINUATIONS"
    # A launcher that does not speak this MPI's language starts as many separate programs, which then write one folder.
    if [ "$RANKS" -gt 1 ] && [ "$CONTINUATIONS" = 0 ]; then
        local sizes
        sizes=$(timeout 300 "${LAUNCH[@]}" "$PYTHON" -c 'from mpi4py import MPI; print(MPI.COMM_WORLD.size)') ||
            refuse "$HPCDEQ_LAUNCHER could not start $RANKS ranks (see above)"
        sizes=$(sort -u <<<"$sizes" | xargs)
        [ "$sizes" = "$RANKS" ] ||
            refuse "$HPCDEQ_LAUNCHER started jobs of $sizes rank(s) where one of $RANKS was asked for: see slurm/env.sh"
    fi
    BEFORE=$("${MEASURE[@]}")
}

run() { # MODULE ARGUMENTS...
    local before
    CODE=$INTERRUPTED
    [ -z "$SIGNAL" ] || return 0
    "${LAUNCH[@]}" "$PYTHON" -m "$@" &
    PROGRAM=$!
    # A signal ends the wait, not the program. That both happen at once is no matter: the status is kept for the next wait.
    while :; do
        before=$ARRIVED
        if wait "$PROGRAM"; then CODE=0; else CODE=$?; fi
        [ "$before" != "$ARRIVED" ] || break
    done
    PROGRAM=
}

end() { # ARGUMENTS...: of the script, which a new job gets again
    local after next
    # Slurm ends processes one by one: the program may be gone before this script is told of it.
    [ "$CODE" = 0 ] || sleep 2 || true
    trap '' USR1 TERM
    if [ "$CODE" = 0 ]; then
        say "done"
        exit 0
    fi
    # Where Slurm ends a job it also ends mpirun's helpers on other nodes, and mpirun then leaves with a code of its own.
    if [ "$CODE" != $INTERRUPTED ] && ! $ENDED && ! { [ -n "$SIGNAL" ] && [ "$CODE" -gt 128 ]; }; then
        say "failed with exit code $CODE"
        exit "$CODE"
    fi
    after=$("${MEASURE[@]}")
    say "interrupted (exit code $CODE${SIGNAL:+, signal $SIGNAL}), $BEFORE samples evaluated before and $after now"
    # Also where it was cancelled a moment ago, with its last words on the way.
    if [ "$SIGNAL" = TERM ] || { ! $ENDED && [[ $(fact JobState) =~ CANCELLED|COMPLETING ]]; }; then
        say "cancelled: the same command goes on from there"
        exit $INTERRUPTED
    fi
    if [ "$after" -le "$BEFORE" ]; then
        say "stopped: this allocation brought no progress. Give a longer --time, or a --signal that comes later"
        exit 1
    fi
    if [ "$HPCDEQ_CONTINUE" = no ] || [ "$CONTINUATIONS" -ge "$HPCDEQ_MAX_CONTINUATIONS" ]; then
        say "stopped after $CONTINUATIONS continuations (HPCDEQ_CONTINUE=$HPCDEQ_CONTINUE," \
            "HPCDEQ_MAX_CONTINUATIONS=$HPCDEQ_MAX_CONTINUATIONS): the same command goes on from there"
        exit $INTERRUPTED
    fi
    if [ "$HPCDEQ_CONTINUE" = requeue ]; then
        say "requeued"
        ! timeout 60 scontrol requeue "$JOB" || exit $INTERRUPTED
        say "Slurm refused"
    fi
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        say "stopped: tasks of an array go on by requeueing alone. Submit the same array again"
        exit $INTERRUPTED
    fi
    export HPCDEQ_LINKS=$((CONTINUATIONS + 1))
    next=$(submit --dependency="afterany:$JOB" --job-name="$SLURM_JOB_NAME" --output="$(fact StdOut)" $(same_size) "$SCRIPT" "$@") || {
        say "stopped: Slurm refused another job, too. The same command goes on from there"
        exit $INTERRUPTED
    }
    say "goes on in job $next"
    exit $INTERRUPTED
}
