#!/usr/bin/env bash
# Set up and run all checks: lint, types, tests on 1, 2, 3 and 5 ranks.
#
#   bash scripts/test.sh            everything
#   bash scripts/test.sh -k NAME    the tests whose name matches, on every number of ranks (arguments go to pytest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh
export OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1

echo "== ruff and mypy"
ruff check hpcdeq tests
ruff format --check hpcdeq tests
mypy

echo "== tests on 1 rank"
python -m pytest -n 2 --dist loadfile -m "not crowded" "$@" || [ $? = 5 ]
python -m pytest -q -m crowded "$@" || [ $? = 5 ] # nothing beside it would meet its time limit
for ranks in 2 3 5; do
    echo "== tests on $ranks ranks"
    # After a failure that one rank has alone, the others wait for it until their time is up: each stops at its first.
    rm -f .setup/test-rank-*.log
    mpirun -n $ranks bash -c '
        rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-0}}}
        if [ "$rank" = 0 ]; then python -m pytest -qx "$@"; else python -m pytest -qx "$@" >".setup/test-rank-$rank.log" 2>&1; fi
        code=$?
        [ $code = 5 ] || exit $code' pytest "$@" || {
        for log in .setup/test-rank-*.log; do
            echo "-- the end of $log"
            tail -n 40 "$log"
        done
        exit 1
    }
done
echo "== all checks passed"
