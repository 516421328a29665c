"""The package's shape: names that hide nobody's module, imports that go one way (DESIGN 4)."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from harness import ROOT

PACKAGE = ROOT / "ibdistill"
MODULES = {
    ".".join(["ibdistill", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(path: Path, *, everywhere: bool = False) -> set[str]:
    """Absolute names that a module imports when it is loaded, or anywhere in it."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import fails when the file is run as a script"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_file_hides_a_module_of_somebody_else():
    """`deepspeed ibdistill/train.py` puts ibdistill/ first on the path: each name is a bare one too."""
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    ours = {path.stem for path in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    assert not (ours - {"__init__", "__pycache__"}) & taken
    assert "kernels" not in ours and "datasets" not in ours  # what it would catch if they were installed


def test_imports_go_one_way():
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules
    assert (
        order.index("ibdistill.config.sections")
        < order.index("ibdistill.training.job")
        < order.index("ibdistill.train")
    )


def test_nobody_imports_the_entry_points():
    entries = {name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text()}
    assert "ibdistill.train" in entries
    for name, path in MODULES.items():
        assert not imports(path, everywhere=True) & entries - {name}, name


def test_the_ops_need_torch_only():
    allowed = sys.stdlib_module_names | {"torch", "triton", "ibdistill"}
    for name, path in MODULES.items():
        if name.startswith("ibdistill.ops."):
            found = imports(path, everywhere=True)
            assert {n.split(".")[0] for n in found} <= allowed, name
            assert all(n.startswith("ibdistill.ops") for n in found if n.startswith("ibdistill")), name


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, ibdistill; assert ibdistill.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_entry_points_define_no_classes():
    """They would be pickled as members of __main__."""
    tree = ast.parse((PACKAGE / "train.py").read_text())
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
