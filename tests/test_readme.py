"""The READMEs: the first one is short, and all are right about paths, settings, commands and figures."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from harness import ROOT

from ibdistill.config.evaluation_sections import AskConfig, EvaluationConfig
from ibdistill.config.sections import Config

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md", "ds_configs/README.md")]
PAGES += sorted([*ROOT.glob("ibdistill/**/README.md"), *ROOT.glob("tools/**/README.md")])
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
SECTIONS = {f.name: f.default_factory for f in fields(Config)} | {"eval": EvaluationConfig, "ask": AskConfig}
SETTINGS = {f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)}
OTHER_SETTINGS = {
    "section.field",
    "rates.FIELD",
    "tokens.question",
    "tokens.label",
    "tokens.rationale",
    "tokens.records",
}
"""Settings that no run has: a placeholder, and those that `tools/plan.py` takes besides."""
TOP = "ibdistill|tools|slurm|tests|ds_configs"
EXAMPLES = {"ibdistill/data/tasks/NAME.py", "ibdistill/data/tasks/yes_or_no.py"}
"""Files that CONTRIBUTING.md tells the reader to write."""
STUDY = ROOT / "tools/study"


def code(text: str) -> str:
    """What a page has in backticks, in fences and in indented blocks."""
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join(re.findall(r"`([^`]+)`", text) + blocks)


def commands(text: str) -> list[list[str]]:
    """The words of each command of an indented block, continued lines joined, comments cut."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line[4:] for line in joined.splitlines() if line.startswith("    ")]
    return [line.split(" #")[0].split() for line in lines]


def runs() -> list[tuple[str, str, list[str]]]:
    """Page, `run` or `rationales`, and arguments of every command that takes the settings of a run."""
    found = []
    for page, name in zip(PAGES, IDS, strict=True):
        for words in commands(page.read_text()):
            script = next(
                (
                    i
                    for i, word in enumerate(words)
                    if re.search(r"/(train|distill|write_rationales|rationales)\.(py|sh)$", word)
                ),
                None,
            )
            if script is not None:
                what = "rationales" if "rationales" in words[script] else "run"
                arguments = [word for word in words[script + 1 :] if word != "..."]
                found.append((name, what, ["svamp" if word == "NAME" else word for word in arguments]))
    return found


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_exist(page):
    text = page.read_text()
    paths = re.findall(rf"(?<![\w/.-])((?:{TOP})/[\w./*-]*\w)", code(text))
    paths += re.findall(r"(?<!\S)((?:\.ci|tests|ds_configs)/?[\w./-]*\w)(?!\S)", code(text))
    missing = [path for path in paths if path not in EXAMPLES and not list(ROOT.glob(path))]
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    missing += [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_settings_exist(page):
    text = page.read_text()
    found = set(re.findall(r"(?<!\S)--(\w+\.\w+)", code(text)))
    named = "|".join(SECTIONS)
    quoted = "\n".join(re.findall(r"`([^`]+)`", text))
    found |= set(
        re.findall(rf"(?<![\w/.-])((?:{named})\.(?!py\b|sh\b|jsonl?\b|yaml\b)\w+)(?![\w/(])", quoted)
    )
    assert not found - SETTINGS - OTHER_SETTINGS


@pytest.mark.parametrize(
    ("page", "what", "arguments"), runs(), ids=lambda value: value if isinstance(value, str) else None
)
def test_commands_have_settings_that_go_together(page, what, arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "slurm/check_settings.py", what, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_commands_were_found():
    """No check of commands above is empty."""
    pages = [page for page, *_ in runs()]
    assert pages.count("README.md") == 4 and pages.count("slurm/README.md") >= 4


def test_every_page_is_linked():
    linked = set()
    for start in (ROOT / "README.md", ROOT / "ibdistill/README.md"):
        linked |= {
            (start.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", start.read_text())
        }
    assert not set(PAGES) - linked - {ROOT / "README.md"}


def test_the_layout_lists_every_file():
    """Data sets share a row with a `*`, so that a new one is a file and its entry in the registry."""
    package = ROOT / "ibdistill"
    listed = re.findall(r"^\| `([\w/*]+\.py)` \|", (package / "README.md").read_text(), re.MULTILINE)
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    wanted = sorted(file for file in files if not file.endswith("__init__.py"))
    of_data_sets = {file for file in wanted if file.startswith("data/tasks/")} - set(listed)
    assert of_data_sets and sorted([*listed, *of_data_sets]) == sorted([*wanted, "data/tasks/*.py"])


def test_the_demo_table_is_what_compare_runs_prints():
    """Its columns and layout are; its figures are those of one machine."""
    sys.path.append(str(ROOT / "tools"))
    import compare_runs

    header, *rows = (
        re.search(r"(?m)^    run  .*\n(?:    \w.*\n)+", (ROOT / "README.md").read_text()).group().splitlines()
    )
    cells = [tuple(re.split(r"\s{2,}", line.strip())) for line in (header, *rows)]
    assert cells[0] == compare_runs.COLUMNS
    printed = compare_runs.table(cells[1:])
    assert [line[4:] for line in (header, *rows)] == printed.splitlines()


def test_the_study_page_has_the_recorded_figures():
    page, table = (STUDY / "README.md").read_text(), (STUDY / "demo_table.md").read_text().split("\nFrom ")[0]
    for line in table.splitlines()[2:]:
        if line.startswith("| "):
            arm, labels, steps, seeds, mean, std, _, versus, _, cpu = (
                c.strip() for c in line.split("|")[1:-1]
            )
            versus = "" if arm == "dss-2-ranks" else versus  # a difference of one seed is none
            row = " | ".join([arm, labels, steps, seeds, mean, std, versus, cpu])
            assert f"| {row} |".replace("  ", " ") in page
    for a, b, value in re.findall(r"^- (\S+) against (\S+): (.*)$", table, re.MULTILINE):
        names = [name.removesuffix("@300").replace("@150", ", 150 labels,") for name in (a, b)]
        names[1] += ", 300 labels" if "150" in a else ""
        assert f"| {names[0]} against {names[1]} | {value} |" in page


def test_the_study_page_has_the_figures_of_the_pretrained_student():
    page, table = (STUDY / "README.md").read_text(), (STUDY / "real_table.md").read_text().split("\nFrom ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = [row for row in rows if len(row) == 10 and row[1] in ("1", "0.5", "0.25")]
    assert len(rows) == 17 + 6
    for arm, share, _, *values, _, _, cpu in rows[17:]:
        assert f"| {' | '.join([arm, share, *values, cpu])} |" in page, arm
    for arm, _, steps, *values, _, cpu in rows[:17]:
        name = {"before": "before distillation"}.get(arm, arm)
        steps = "50 + 50" if arm == "own-after-cot" else steps
        cells = re.escape(" | ".join([steps, *values, cpu]))
        assert re.search(rf"(?m)^\| {re.escape(name)}([:,][^|]*)? \| {cells} \|", page), arm
    compared = re.findall(r"(?m)^- (\S+)@1 against (\S+)@1: (.*), p", table)
    assert len(compared) == 10
    assert all(f"| {a} against {b} | {value} | " in page for a, b, value in compared)


def test_the_study_page_has_the_figures_of_the_probe():
    page, table = (STUDY / "README.md").read_text(), (STUDY / "real_probe_table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    of = {(row[0], len(row)): row for row in rows if len(row) > 9}
    for task, name in (("gsm8k", "GSM8K"), ("cose", "CoS-E")):
        for part, model in (("", "10-layer cut"), ("-whole", "whole SmolLM2-135M")):
            before, after = (of[f"{task}{part}{when}", 10] for when in ("-before", ""))
            unanswered = [of[f"{task}{part}{when}", 11][-1] for when in ("-before", "")]
            cells = [f"{name}, {model}", before[4], after[4], after[-1], *unanswered]
            assert f"| {' | '.join(cells)} |" in page


def test_the_differences_that_pages_state_follow_from_the_recorded_ones():
    page, printed = (STUDY / "README.md").read_text(), []
    for table in ("demo_table.md", "real_table.md"):
        command = [sys.executable, STUDY / "paired.py", STUDY / table]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        printed += re.findall(r"(\d+) seeds  p (\S+)  (holds)?", shown.stdout)
    row = r"^\| .* against .* \| .* \| +(\d+) \| (\S+) \| (yes|no) \|$"
    assert re.findall(row, page, re.MULTILINE) == [
        (*values, "yes" if holds else "no") for *values, holds in printed
    ]
    further = re.findall(r"^\| (\S+@\d+) \| (\S+@\d+) \| (\S+ \[.*\]) \| (\d+) \|$", page, re.MULTILINE)
    arguments = itertools.chain.from_iterable(row[:2] for row in further)
    shown = subprocess.run(
        [sys.executable, STUDY / "paired.py", STUDY / "demo_table.md", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = shown.stdout.splitlines()
    assert len(further) == len(lines) == 4
    for (a, b, value, seeds), line in zip(further, lines, strict=True):
        assert line.split()[:2] == [a, b] and value in line and f"{seeds} seeds" in line
    front = (ROOT / "README.md").read_text()
    assert {value for a, b, value, _ in further if b == "dss-equal@300" and a != "vid+kd@150"} <= {
        value for value in re.findall(r"[+-][\d.]+ \[[^]]*\]", front)
    }


def test_one_version_of_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    wanted = re.search(r"^ruff==\S+$", (ROOT / "tools/constraints.txt").read_text(), re.MULTILINE).group()
    found = [hook["additional_dependencies"] for hook in hooks if hook["id"].startswith("ruff")]
    assert found == [[wanted]] * 2


DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "xdist": "pytest-xdist",
    "sentence_transformers": "sentence-transformers",
    "math_verify": "math-verify",
}
INDIRECT = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "pydantic": "deepspeed",
    "pyarrow": "datasets",
    "markdown": "tensorboard",
    "PIL": "matplotlib",
}
"""What is imported -> the declared distribution that brings it along."""


def third_party(folders: list[str]) -> set[str]:
    """The distributions that the Python files of some folders import."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    ours = {path.stem for path in paths} | {path.parent.name for path in paths} | {"ibdistill", "workers"}
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    names -= sys.stdlib_module_names | ours
    return {INDIRECT.get(name, DISTRIBUTIONS.get(name, name)) for name in names}


def declared(name: str) -> set[str]:
    """The distributions in one of pyproject.toml's lists."""
    text = (ROOT / "pyproject.toml").read_text()
    return set(re.findall(r'"([\w-]+)', re.search(rf"(?ms)^{name} = \[(.*?)\]$", text).group(1)))


def test_what_is_imported_is_declared():
    """`pip install -e .[dev]` is enough. Triton comes with torch; others are asked for by name."""
    plain, optional = declared("dependencies"), {"triton", "bitsandbytes", "vllm"}
    optional |= declared("embedding") | declared("math") | declared("wandb")
    assert third_party(["ibdistill", "slurm"]) <= plain | optional
    compared = {"trl"}  # in an environment of its own, tools/bench/trl_trainers.py
    assert third_party(["tests", "tools"]) <= plain | optional | declared("dev") | compared
