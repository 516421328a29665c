"""The layout: no name hides the module of another package, and imports go one way."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

PACKAGE = ROOT / "ibdistill"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


ORDER = (
    "runtime ops config data models objectives evaluation teacher monitor planning training entries"
).split()
"""A package imports only those before it, and `ops` imports no other."""
SCRIPT_FOLDERS = [PACKAGE, ROOT / "tools", ROOT / "tools/bench", ROOT / "tools/study", ROOT / "slurm"]
"""Folders with files that are run as scripts: Python puts the folder of a script first on its path."""


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere: at the top, inside functions, under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import fails when the file is run as a script"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importable(folder: Path) -> set[str]:
    """The bare names under which a folder's files and folders can be imported once it is on the path."""
    files = {path.stem for path in folder.glob("*.py")}
    folders = {path.name for path in folder.iterdir() if path.is_dir() and path.name.isidentifier()}
    return {name for name in files | folders if not name.startswith("__")}


def test_the_top_level_is_fixed():
    """What a tool leaves behind does not join it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    entries = "CONTRIBUTING.md LICENSE README.md ds_configs ibdistill pyproject.toml slurm tests tools"
    assert {name for name in top if not name.startswith(".")} == set(entries.split())


def test_every_script_folder_is_known():
    """Files of the package's inner folders and of tools/plan are never run as scripts."""
    scripts = {
        path.parent
        for folder in (PACKAGE, ROOT / "tools", ROOT / "slurm")
        for path in folder.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert scripts == set(SCRIPT_FOLDERS)


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS, ids=lambda folder: folder.name)
def test_no_name_hides_a_module_of_another_package(folder):
    """`deepspeed ibdistill/train.py` puts ibdistill/ first on the path: each name is a bare one too."""
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    taken |= {"kernels", "datasets", "tokenizers", "evaluate"}  # what is installed differs by machine
    assert importable(folder) and not importable(folder) & taken


def package_of(name: str) -> str:
    """The place in `ORDER` of a module, by its full name."""
    second = name.split(".")[1]
    return second if second in ORDER else "entries"


def test_a_package_imports_only_those_before_it():
    for name, path in MODULES.items():
        own = package_of(name)
        for other in map(package_of, imports(path) & MODULES.keys()):
            assert ORDER.index(other) <= ORDER.index(own), f"{name} imports {other}"
            assert own != "ops" or other == "ops", f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    files = {name: path for name, path in MODULES.items() if path.name != "__init__.py"}
    graph = {name: imports(path) & files.keys() for name, path in files.items()}
    assert "ibdistill.training.job" in list(graphlib.TopologicalSorter(graph).static_order())  # or CycleError


def test_nobody_imports_the_entry_points():
    entries = {name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text()}
    assert "ibdistill.train" in entries
    for name, path in MODULES.items():
        assert not imports(path) & entries - {name}, name


def test_the_ops_need_torch_only():
    allowed = sys.stdlib_module_names | {"torch", "triton", "ibdistill"}
    for name, path in MODULES.items():
        if name.startswith("ibdistill.ops."):
            found = imports(path)
            assert {n.split(".")[0] for n in found} <= allowed, name
            assert all(n.startswith("ibdistill.ops") for n in found if n.startswith("ibdistill")), name


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, ibdistill; assert ibdistill.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_package_lists_its_entry_points():
    printed = subprocess.run([sys.executable, "-m", "ibdistill"], capture_output=True, text=True, cwd=ROOT)
    listed = {path for path in printed.stdout.split() if path.endswith(".py")}
    entries = {path for path in PACKAGE.glob("[a-z]*.py") if '__name__ == "__main__"' in path.read_text()}
    assert listed == {str(path.relative_to(ROOT)) for path in entries} and len(listed) == 4
    assert printed.stdout.startswith("ibdistill 0.1.0, commit ")


@pytest.mark.parametrize("entry", ["__main__", "train", "evaluate_student", "ask", "write_rationales"])
def test_help_waits_for_no_heavy_import(entry):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{entry}', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(PACKAGE / f'{entry}.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print({'torch', 'transformers', 'deepspeed'} & sys.modules.keys())\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0 and shown.stdout.endswith("set()\n") and len(shown.stdout) > 200


def test_entry_points_define_no_classes():
    """They would be pickled as members of __main__."""
    tree = ast.parse((PACKAGE / "train.py").read_text())
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_no_two_classes_have_one_name():
    """A name that stands for two things makes a reader look twice."""
    found = [
        name
        for folder in ("ibdistill", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"(?m)^class (\w+)", path.read_text())
    ]
    assert sorted(name for name in set(found) if found.count(name) > 1) == []


LONGEST_FILE = 300
"""Lines. A longer file holds two things, or says one thing too often."""
BUDGET = 29_355
"""Lines of the package. CONTRIBUTING.md says who may raise it."""


@pytest.mark.parametrize("folder", ["ibdistill", "tools", "slurm"])
def test_no_file_is_long(folder):
    lines = {path: path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > LONGEST_FILE} == {}


def test_the_package_keeps_its_budget():
    assert sum(path.read_text().count("\n") for path in MODULES.values()) <= BUDGET


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name, wherever they lie."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
