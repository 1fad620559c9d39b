"""What PETSc this is."""

from __future__ import annotations

from pathlib import Path

import petsc4py

from hpcdeq.petsc import PETSc


def petsc_facts() -> dict[str, str]:
    """Return version, scalar type, integer size, folder, MPI compiler and BLAS of the PETSc in use. Not collective."""
    settings = petsc4py.get_config()
    folder = Path(settings["PETSC_DIR"]) / settings.get("PETSC_ARCH", "")
    variables = {}
    for line in (folder / "lib/petsc/conf/petscvariables").read_text().splitlines():
        name, _, value = line.partition("=")
        variables[name.strip()] = value.strip()
    scalar = "complex" if PETSc.ScalarType().dtype.kind == "c" else "real"
    return {
        "version": ".".join(map(str, PETSc.Sys.getVersion())),
        "scalar": f"{scalar} float{8 * PETSc.RealType().itemsize}",
        "integer": f"int{8 * PETSc.IntType().itemsize}",
        "petsc_dir": str(folder),
        "mpi_compiler": variables.get("PCC", "unknown"),
        "blas": variables.get("BLASLAPACK_LIB", "unknown"),
    }
