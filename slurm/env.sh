# The one file that is of a machine. Sourced by every job, and on every machine the same questions are answered here.
# What is set in the environment that a job is submitted from wins, so that a job can be tried without editing.

# 1. How a job gets at Python, MPI and PETSc. sbatch hands the environment on, so that an active one (venv, conda) is
#    taken; else the one that scripts/setup.sh made. Where modules are needed, load them here, before it:
#        module load gcc openmpi
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    PATH=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin:$PATH
else
    source "$HPCDEQ_SLURM/../scripts/activate.sh"
fi

# 2. What starts the ranks: mpirun (knows the allocation by itself), or srun (`srun --mpi=list` must have pmix, and the
#    MPI must have been built with it; one that wants pmi2 has it in LAUNCH below).
HPCDEQ_LAUNCHER=${HPCDEQ_LAUNCHER:-mpirun}

# 3. Whether each rank is bound to cores of its own: yes, no, or auto, which binds where the node really has as many
#    processors for this job as Slurm says (it has not where a partition is overcommitted).
HPCDEQ_BIND=${HPCDEQ_BIND:-auto}
if [ "$HPCDEQ_BIND" = auto ]; then
    if [ "$(nproc)" -ge "$SLURM_CPUS_ON_NODE" ]; then HPCDEQ_BIND=yes; else HPCDEQ_BIND=no; fi
fi

# 4. What becomes of a job that is cut before its end: requeue (the same job again), chain (a new job after it: where
#    Slurm refuses requeueing, which is also what requeue falls back to), or no.
HPCDEQ_CONTINUE=${HPCDEQ_CONTINUE:-requeue}
#    How often at most, whatever happens.
HPCDEQ_MAX_CONTINUATIONS=${HPCDEQ_MAX_CONTINUATIONS:-100}

# The launch itself, from the allocation: RANKS, THREADS a rank.
case "$HPCDEQ_LAUNCHER:$HPCDEQ_BIND" in
srun:yes) LAUNCH=(srun --mpi=pmix --ntasks="$RANKS" --cpus-per-task="$THREADS" --cpu-bind=cores) ;;
srun:*) LAUNCH=(srun --mpi=pmix --ntasks="$RANKS" --cpus-per-task="$THREADS") ;;
# In Slurm's words a processor is what Open MPI calls a hardware thread where cores have several.
mpirun:yes) LAUNCH=(mpirun -n "$RANKS" --use-hwthread-cpus --map-by "slot:PE=$THREADS" --bind-to hwthread) ;;
mpirun:*) LAUNCH=(mpirun -n "$RANKS" --bind-to none) ;;
*) refuse "HPCDEQ_LAUNCHER is $HPCDEQ_LAUNCHER: choose mpirun or srun, or say in slurm/env.sh how it starts ranks" ;;
esac
