# The one file that is of a machine: four questions that every job asks. What HPCDEQ_... is in the environment that a job is
# submitted from wins, so that an answer can be tried without editing.

# 1. How a job gets at Python, MPI and PETSc. sbatch hands the environment on, so that an active one (venv, conda) is
#    taken; else the one that scripts/setup.sh made. Where modules are needed, load them here, before it:
#        module load gcc openmpi
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    PATH=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin:$PATH
else
    [ -f "$HPCDEQ_SLURM/../.setup/environment" ] ||
        refuse "there is no environment: run scripts/setup.sh once, or activate one before sbatch, or see slurm/env.sh"
    source "$HPCDEQ_SLURM/../scripts/activate.sh"
fi

# 2. What starts the ranks: mpirun, which finds the allocation by itself, or srun, which needs a plugin that speaks with the
#    MPI (`srun --mpi=list`; pmix for Open MPI, pmi2 for many others: change it in LAUNCH below). A pair that does not fit
#    starts separate programs of one rank each: every job looks for that first, and refuses it.
HPCDEQ_LAUNCHER=${HPCDEQ_LAUNCHER:-mpirun}

# 3. Whether each rank is bound to cores of its own: yes, no, or auto, which binds where the node lets this job use
#    just as many processors as it was given: elsewhere others might be bound to the same ones.
HPCDEQ_BIND=${HPCDEQ_BIND:-auto}
if [ "$HPCDEQ_BIND" = auto ]; then
    if [ "$(nproc)" = "$SLURM_CPUS_ON_NODE" ]; then HPCDEQ_BIND=yes; else HPCDEQ_BIND=no; fi
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
