"""The commit that a run names: of the code's own repository, dirty where it is, never an error."""

from __future__ import annotations

import subprocess

import pytest

import ibdistill
from ibdistill.runtime import version


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "v1")
    return tmp_path


def commit_of(folder) -> str:
    return version.commit.__wrapped__(folder)


def test_a_commit_is_short_and_dirty_where_tracked_files_differ(repository):
    package = repository / "package"
    short = git(repository, "rev-parse", "--short", "HEAD")
    assert commit_of(package) == short
    (repository / "untracked").write_text("")
    assert commit_of(package) == short
    (package / "__init__.py").write_text("a = 1\n")
    assert commit_of(package) == f"{short}-dirty"


def test_the_variables_of_a_git_hook_lead_to_no_other_repository(repository, monkeypatch):
    short = git(repository, "rev-parse", "--short", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit_of(repository / "package") == short


def test_outside_its_own_repository_the_commit_is_unknown(repository, tmp_path_factory, monkeypatch):
    installed = repository / ".venv" / "package"  # within a repository that does not hold it
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit_of(installed) == "unknown"
    assert commit_of(tmp_path_factory.mktemp("plain")) == "unknown"
    assert commit_of(repository / "missing") == "unknown"
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit_of(repository / "package") == "unknown"


def test_a_result_names_both():
    assert version.version() == {"version": ibdistill.__version__, "commit": version.commit()}
