# Sourced by the other scripts: the environment that setup.sh made or found, and an MPI that starts in a container.
PATH=$(cat "$(dirname "${BASH_SOURCE[0]}")/../.setup/environment")/bin:$PATH
export PATH
# Open MPI refuses root unless told twice; containers and continuous integration are root. Other MPIs ignore these.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# More ranks than cores, in Open MPI 5 and in 4.
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1
