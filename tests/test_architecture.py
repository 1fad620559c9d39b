"""The house of hpcdeq stands as designed: imports go down, MPI and PETSc stay in their rooms, everything is explained."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Run

# From the ground up: a module imports its own package and what stands below it.
FLOORS = [
    {"errors", "startup", "commands", "methods", "state", "traffic", "watchdog"},
    {"parallel"},
    {"petsc"},
    {"deq"},
    {"data"},
    {"builders"},
    {"models"},
    {"problem"},
    {"optim"},
    {"record"},
    {"tuning"},
    {"report"},
    {"config"},
    {"config_options", "label_options"},
    {"inference", "tasks", "continuing"},
    {"train", "training", "prepare", "doctor", "predict", "evaluate", "compare", "study", "campaign"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
COMMANDS = FLOORS[-1]
# Which parts of hpcdeq may import a package from outside. Builders solve the equations whose solutions are their samples.
ROOMS = {
    "mpi4py": {"parallel"},
    "petsc4py": {"petsc"},
    "hpcdeq.petsc": {"petsc", "deq", "builders", "optim", "inference"},
}
# What says in plain text which PETSc this is, for anyone.
OPEN = {"hpcdeq.petsc.facts"}
# Costly, or needed by one command only: never imported with the module.
LAZY = {"pymatgen", "rdkit", "matplotlib", "sklearn"}
SAYS_WHO_CALLS = {"parallel", "petsc", "deq", "problem", "optim"}
LONGEST = 400
# A contract of torch's: its subclasses' methods need no docstring of their own.
TORCH_METHODS = {"forward", "setup_context", "backward", "vjp", "jvp"}

Tree = dict[str, str]  # module name -> source


@dataclass(frozen=True)
class Import:
    """``module`` is imported; ``late``: inside a function or for type checkers only."""

    module: str
    late: bool
    line: int


def read_tree(folder: Path) -> Tree:
    """Return the sources of the package in a folder."""
    names = {path: path.relative_to(folder.parent).with_suffix("").parts for path in sorted(folder.rglob("*.py"))}
    return {".".join(p for p in parts if p != "__init__"): path.read_text() for path, parts in names.items()}


def part_of(module: str) -> str:
    """Return the second name: the package of hpcdeq that a module belongs to; hpcdeq itself for the root."""
    return (module.split(".") + ["hpcdeq"])[1]


def imports_of(source: str, tree: Tree) -> Iterator[Import]:
    """Yield every import of a module, wherever it stands, those by name included."""
    lazy_names = "import_module" in source

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full != "hpcdeq.__version__":
                    yield Import(full if full in tree else module, late, node.lineno)
        elif lazy_names and isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in tree:
            yield Import(node.value, True, node.lineno)
        inside = (
            late or isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in dump(node))
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    def dump(node: ast.If) -> str:
        return ast.dump(node.test)

    yield from visit(ast.parse(source), False)


def import_violations(tree: Tree) -> Iterator[str]:
    """Yield what is imported where it must not be."""
    for name, source in tree.items():
        own = part_of(name)
        if name != "hpcdeq" and own not in FLOOR:
            yield f"{name}: has no floor in the table"
            continue
        for found in imports_of(source, tree):
            where, other = f"{name}:{found.line}", part_of(found.module)
            outside = found.module.split(".")[0]
            if found.module.startswith("."):
                yield f"{where}: relative import"
            elif found.module == "hpcdeq":
                yield f"{where}: imports hpcdeq itself, which stands on top"
            elif outside == "hpcdeq" and name != "hpcdeq" and other not in FLOOR:
                yield f"{where}: imports {found.module}, which has no floor"
            elif outside == "hpcdeq" and name != "hpcdeq" and FLOOR[other] > FLOOR[own]:
                yield f"{where}: {own} imports {other}, which stands above it"
            if outside in LAZY and not found.late:
                yield f"{where}: imports {outside} with the module"
            for package, allowed in ROOMS.items():
                inside = found.module not in OPEN and (found.module + ".").startswith(package + ".")
                if inside and own not in allowed and not (own in COMMANDS and found.late):
                    yield f"{where}: {own} imports {package}, which belongs to {', '.join(sorted(allowed))}"


def cycle_violations(tree: Tree) -> Iterator[str]:
    """Yield one import cycle, if there is any; imports in functions count."""
    graph = {name: {i.module for i in imports_of(source, tree) if i.module in tree} for name, source in tree.items()}
    del graph["hpcdeq"]
    while graph:
        ground = {name for name, above in graph.items() if not (above - {name}) & graph.keys()}
        if not ground:
            yield f"import cycle among {', '.join(sorted(graph))}"
            return
        graph = {name: above for name, above in graph.items() if name not in ground}


def docstring_violations(tree: Tree) -> Iterator[str]:
    """Yield what is public and unexplained, and what does not say who must call it."""
    inherited = methods_by_class(tree)
    for name, source in tree.items():
        module = ast.parse(source)
        if not ast.get_docstring(module):
            yield f"{name}: no docstring"
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield from function_violations(name, node, "")
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                told = ast.get_docstring(node) or ""
                if not told:
                    yield f"{name}.{node.name}: no docstring"
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                known = set().union(*(inherited.get(base, set()) for base in bases)) | (
                    TORCH_METHODS if bases else set()
                )
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        if ast.get_docstring(method) or method.name not in known:
                            yield from function_violations(f"{name}.{node.name}", method, told)


def methods_by_class(tree: Tree) -> dict[str, set[str]]:
    """Return the explained methods of each class: a subclass may leave their docstrings out."""
    classes = [n for source in tree.values() for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    return {
        c.name: {m.name for m in c.body if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)} for c in classes
    }


def function_violations(where: str, node: ast.FunctionDef, told_by_class: str) -> Iterator[str]:
    """Yield what is missing from a function's docstring; a property is not called, and a class may speak for all."""
    told = ast.get_docstring(node) or ""
    is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
    if not told:
        yield f"{where}.{node.name}: no docstring"
    elif part_of(where) in SAYS_WHO_CALLS and not is_property and "ollective" not in told + told_by_class:
        yield f"{where}.{node.name}: does not say whether it is collective"


def length_violations(tree: Tree) -> Iterator[str]:
    """Yield modules that hold more than one idea."""
    for name, source in tree.items():
        if (lines := source.count("\n")) > LONGEST:
            yield f"{name}: {lines} lines, more than {LONGEST}"


LAWS = [import_violations, cycle_violations, docstring_violations, length_violations]


@pytest.mark.parametrize("law", LAWS)
def test_the_sources_keep_the_law(law) -> None:
    assert not list(law(read_tree(ROOT / "hpcdeq")))


def test_every_module_was_read() -> None:
    tree = read_tree(ROOT / "hpcdeq")
    assert {"hpcdeq", "hpcdeq.errors", "hpcdeq.petsc", "hpcdeq.petsc.vectors", "hpcdeq.train"} <= tree.keys()
    found = {(i.module, i.late) for i in imports_of(tree["hpcdeq.training"], tree)}
    assert {("hpcdeq.config", False), ("hpcdeq.problem", True), ("hpcdeq.parallel", True), ("torch", True)} <= found
    assert ("hpcdeq.data.dataset", True) in {(i.module, i.late) for i in imports_of(tree["hpcdeq.data"], tree)}


HEAD = '"""Say."""\n'
CLEAN = {
    "hpcdeq": HEAD + "import importlib\nHOME = {'x': 'hpcdeq.deq'}\nimportlib.import_module\n",
    "hpcdeq.errors": HEAD,
    "hpcdeq.parallel": HEAD + "from mpi4py import MPI\nfrom hpcdeq.errors import E\n",
    "hpcdeq.petsc": HEAD + "import petsc4py\n",
    "hpcdeq.deq": HEAD + "from hpcdeq.deq.solver import solve\n",
    "hpcdeq.deq.solver": HEAD + "from hpcdeq.petsc import PETSc\n"
    "from hpcdeq import __version__\n"
    'class Base:\n    """Say. Not collective."""\n    def a(self):\n        """Do."""\n'
    'class Child(Base):\n    """Say."""\n    def a(self):\n        return 1\n',
    "hpcdeq.builders": HEAD + "def _f():\n    import pymatgen.core\n",
    "hpcdeq.models": HEAD + "import torch\nfrom hpcdeq.deq import FixedPoint\n",
    "hpcdeq.problem": HEAD + 'def f():\n    """Do. Collective on comm."""\n',
    "hpcdeq.optim": HEAD + "from hpcdeq.petsc import PETSc\n",
    "hpcdeq.record": HEAD,
    "hpcdeq.train": HEAD,
    "hpcdeq.doctor": HEAD + "def main():\n    'Do.'\n    from mpi4py import MPI\n",
}
PLANTED = {
    "optim imports record": ("hpcdeq.optim", "import hpcdeq.record\n", "optim imports record, which stands above"),
    "in a function": (
        "hpcdeq.optim",
        "def _f():\n    from hpcdeq import record\n",
        "optim imports record, which stands",
    ),
    "for type checkers": ("hpcdeq.deq", "if TYPE_CHECKING:\n    from hpcdeq.models import M\n", "deq imports models"),
    "by name": ("hpcdeq.deq", "import importlib\nimportlib.import_module('hpcdeq.models')\n", "deq imports models"),
    "models import problem": ("hpcdeq.models", "from hpcdeq.problem import f\n", "models imports problem"),
    "a library imports a command": ("hpcdeq.record", "from hpcdeq.train import main\n", "record imports train"),
    "through the root": ("hpcdeq.record", "from hpcdeq import minimize\n", "imports hpcdeq itself"),
    "relative": ("hpcdeq.record", "from . import train\n", "relative import"),
    "MPI": ("hpcdeq.deq", "from mpi4py import MPI\n", "deq imports mpi4py, which belongs to parallel"),
    "MPI in a function": ("hpcdeq.problem", "def _f():\n    import mpi4py\n", "problem imports mpi4py"),
    "MPI with a command": ("hpcdeq.doctor", "from mpi4py import MPI\n", "doctor imports mpi4py"),
    "petsc4py": ("hpcdeq.deq", "import petsc4py\n", "deq imports petsc4py, which belongs to petsc"),
    "PETSc": (
        "hpcdeq.models",
        "from hpcdeq.petsc import PETSc\n",
        "models imports hpcdeq.petsc, which belongs to builders",
    ),
    "pymatgen": ("hpcdeq.builders", "from pymatgen.core import Structure\n", "imports pymatgen with the module"),
    "a cycle": ("hpcdeq.deq.solver", "def _f():\n    import hpcdeq.deq\n", "import cycle among .*hpcdeq.deq.solver"),
    "no floor": ("hpcdeq.utils", "", "hpcdeq.utils: has no floor"),
    "an unexplained function": ("hpcdeq.record", "def f():\n    pass\n", r"record\.f: no docstring"),
    "an unexplained class": ("hpcdeq.record", "class C:\n    pass\n", r"record\.C: no docstring"),
    "an unexplained method": (
        "hpcdeq.deq.solver",
        'class D(Base):\n    """Say."""\n    def b(self):\n        pass\n',
        r"solver\.D\.b: no docstring",
    ),
    "who calls a function": (
        "hpcdeq.problem",
        'def g():\n    """Do."""\n',
        r"problem\.g: does not say whether it is coll",
    ),
    "who calls a method": (
        "hpcdeq.optim",
        'class C:\n    """Say."""\n    def f(self):\n        """Do."""\n',
        r"optim\.C\.f: does not say whether it is collective",
    ),
    "length": ("hpcdeq.record", "pass\n" * 400, "hpcdeq.record: 401 lines"),
}


def violations(tree: Tree) -> list[str]:
    return list(itertools.chain.from_iterable(law(tree) for law in LAWS))


def test_a_clean_tree_has_no_violation() -> None:
    assert violations(CLEAN) == []


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_violation_is_found(kind: str) -> None:
    module, more, expected = PLANTED[kind]
    found = violations({**CLEAN, module: CLEAN.get(module, HEAD) + more})
    assert any(re.search(expected, text) for text in found)
    assert len(found) == 1 or (len(found) == 2 and "import cycle" in found[1])  # going up often closes a cycle


def test_a_module_without_docstring_is_found() -> None:
    assert violations({**CLEAN, "hpcdeq.record": "x = 1\n"}) == ["hpcdeq.record: no docstring"]


def test_a_tree_is_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "hpcdeq" / "deq").mkdir(parents=True)
    (tmp_path / "hpcdeq" / "deq" / "__init__.py").write_text("a")
    (tmp_path / "hpcdeq" / "deq" / "solver.py").write_text("b")
    assert read_tree(tmp_path / "hpcdeq") == {"hpcdeq.deq": "a", "hpcdeq.deq.solver": "b"}


HELP = """
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module(MODULE, run_name="__main__")
except SystemExit as leave:
    assert leave.code == 0
print("HEAVY", sorted({"torch", "petsc4py", "mpi4py", "numpy", "h5py"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "module", ["hpcdeq.train", "hpcdeq.prepare", "hpcdeq.doctor", "hpcdeq.study", "hpcdeq.compare"]
)
def test_help_needs_nothing_heavy(run: Run, module: str) -> None:
    done = run("-c", f"MODULE = {module!r}\n{HELP}")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and done.stdout.endswith("HEAVY []\n")
