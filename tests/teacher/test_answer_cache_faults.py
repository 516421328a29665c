"""The answer cache after a crash, on a full disk, without permission, and beside files of something else."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from harness import ROOT, full_disk
from safetensors import safe_open
from safetensors.torch import save_file
from test_answer_cache import FINGERPRINT, entry, fill, holds, key, make

from ibdistill.teacher import cache as teacher_cache
from ibdistill.teacher.cache import AnswerCache

WRITER = """
import itertools, os, sys, time
sys.path.insert(0, "tests/teacher")
import test_answer_cache as t
cache = t.AnswerCache(t.Path(sys.argv[1]), t.FINGERPRINT, rank=0)
mode = sys.argv[2]
for start in itertools.count(0, 50):
    t.fill(cache, range(start, start + 50))
    if start == 50 and mode == "half":
        def stop(descriptor):  # half of the file is on disk, the rest never will be
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            print("writing", flush=True)
            time.sleep(60)
        os.fsync = stop
    cache.flush()
    if mode == "any":
        print(start, flush=True)
"""


def kill_a_writer(folder: Path, mode: str, after: int, delay: float) -> None:
    """Start a process that writes shards of 50 entries; SIGKILL so many lines and seconds later."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), mode], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(after):
            assert process.stdout.readline()
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_writer_loses_the_unfinished_shard_only(tmp_path, caplog):
    kill_a_writer(tmp_path, "half", after=1, delay=0)
    (left,) = tmp_path.glob(".tmp-*")
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    assert holds(cache, range(50)) and len(cache) == 50 and not caplog.records
    assert left.exists(), "it may be another rank's, in the middle of its writing"
    fill(cache, range(50, 100))
    cache.flush()

    an_hour_ago = time.time() - teacher_cache.ABANDONED_SECONDS - 60
    os.utime(left, (an_hour_ago, an_hour_ago))
    assert holds(AnswerCache(tmp_path, FINGERPRINT, rank=0, read_only=True), range(100)) and left.exists()
    assert holds(AnswerCache(tmp_path, FINGERPRINT, rank=0), range(100)) and not left.exists()


def test_a_writer_killed_at_any_moment_leaves_whole_shards(tmp_path, caplog):
    kill_a_writer(tmp_path, "any", after=5, delay=random.Random().uniform(0, 0.02))
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    assert len(cache) >= 250 and len(cache) % 50 == 0 and not caplog.records
    assert holds(cache, range(len(cache)))


def test_another_fingerprint_is_refused_with_both_shown(tmp_path):
    make(tmp_path, range(3))
    other = {"teacher": "b", "template": {"predict": "predict: "}, "top_k": [16], "bits": 8}
    with pytest.raises(ValueError) as error:
        AnswerCache(tmp_path, other, rank=0)
    assert str(error.value) == (
        f"answer cache {tmp_path} was made by something else: bits is absent there and 8 here; "
        'teacher is "a" there and "b" here; top_k is [8] there and [16] here. '
        "Choose another folder, or delete that one to compute its answers again"
    )
    reordered = dict(reversed(FINGERPRINT.items())) | {"top_k": (8,)}
    assert holds(AnswerCache(tmp_path, reordered, rank=0), range(3))


def test_what_is_no_cache_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(
        ValueError, match=r"is no answer cache: it has no fingerprint.json and holds thesis.tex; choo"
    ):
        AnswerCache(tmp_path, FINGERPRINT, rank=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="cannot be read: .*No such file.*nowhere"):
        AnswerCache(tmp_path / "nowhere", FINGERPRINT, rank=0, read_only=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no answer cache: .* and holds nothing; choose a cache"):
        AnswerCache(tmp_path / "empty", FINGERPRINT, rank=0, read_only=True)
    with pytest.raises(ValueError, match="thesis.tex/cache cannot be written: .*choose another folder"):
        AnswerCache(tmp_path / "thesis.tex" / "cache", FINGERPRINT, rank=0)
    os.mkfifo(tmp_path / "empty" / "fingerprint.json")
    with pytest.raises(ValueError, match="empty/fingerprint.json is a named pipe, a device or a socket"):
        AnswerCache(tmp_path / "empty", FINGERPRINT, rank=0)


@pytest.mark.parametrize("text", ["", "{", "3", "[1]", "[]", "null", "[" * 100_000])
def test_a_damaged_fingerprint_is_refused(tmp_path, text):
    make(tmp_path, range(3))
    (tmp_path / "fingerprint.json").write_text(text)
    with pytest.raises(ValueError, match="fingerprint.json is damaged; delete "):
        AnswerCache(tmp_path, FINGERPRINT, rank=0)


def test_another_format_is_refused(tmp_path, monkeypatch):
    make(tmp_path, range(3))
    monkeypatch.setattr(teacher_cache, "FORMAT", "ibdistill-answers-3")
    with pytest.raises(
        ValueError, match='format is "ibdistill-answers-2" there and "ibdistill-answers-3" here'
    ):
        AnswerCache(tmp_path, FINGERPRINT, rank=0)


def shard_of_another_cache(path: Path) -> None:
    make(path.parent / "other", range(3))  # same fingerprint, so its shard would be welcome
    other = AnswerCache(path.parent / "another", {"teacher": "b"}, rank=0)
    fill(other, range(3))
    other.flush()
    shutil.copy(next((path.parent / "another").glob("shard-*")), path)


def shard_of_other_tensors(path: Path) -> None:
    other = AnswerCache(path.parent / "other", FINGERPRINT, rank=0)
    other.put(key(7), {"states": torch.zeros(2, 5)})
    other.flush()
    shutil.copy(next((path.parent / "other").glob("shard-*")), path)


def one_flipped_byte(path: Path) -> None:
    """Flip a byte in the middle of the file, where rows are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_checksum(path: Path) -> None:
    """Write the shard as format 1 did, under today's fingerprint."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, no mapping
        metadata = {"fingerprint": file.metadata()["fingerprint"]}
    save_file(tensors, path, metadata)


DAMAGES = {
    "one flipped byte": (one_flipped_byte, "does not match its checksum"),
    "without checksum": (without_checksum, "does not match its checksum"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 7), "incomplete metadata"),
    "headless": (lambda path: os.truncate(path, 20), "header"),
    "empty": (lambda path: os.truncate(path, 0), "header too small"),
    "foreign": (lambda path: save_file({"w": torch.ones(3)}, path), "its metadata is {} instead of"),
    "of much metadata": (
        lambda path: save_file({"w": torch.ones(3)}, path, {"fingerprint": "a" * 10**5}),
        r"its metadata is .{80} instead of",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is ignored"),
    "of another cache": (shard_of_another_cache, "its metadata is {'fingerprint': "),
    "of other tensors": (shard_of_other_tensors, "its tensors .* are .*float32.* and .* has .*bfloat16"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_named_once_and_ignored(tmp_path, caplog, damage):
    make(tmp_path / "cache", range(10))
    writer = AnswerCache(tmp_path / "cache", FINGERPRINT, rank=1)
    fill(writer, range(10, 20))
    writer.flush()
    (bad,) = (tmp_path / "cache").glob("shard-00001-*")
    act, message = DAMAGES[damage]
    act(bad)

    cache = AnswerCache(tmp_path / "cache", FINGERPRINT, rank=0)
    cache.refresh()
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and bad.name in warning.getMessage()
    assert re.search(message, warning.getMessage())
    assert holds(cache, range(10)) and cache.missing([key(i) for i in range(20)]) == 10
    fill(cache, range(10, 20))
    cache.flush()
    assert holds(AnswerCache(tmp_path / "cache", FINGERPRINT, rank=0), range(20))


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path):
    cache = make(tmp_path, range(50))
    fill(cache, range(50, 100))
    with (
        full_disk(1000),
        pytest.raises(OSError, match=f"{tmp_path} cannot take another shard: File too large; free"),
    ):
        cache.flush()
    assert holds(cache, range(100)) and not list(tmp_path.glob(".tmp-*"))
    assert holds(AnswerCache(tmp_path, FINGERPRINT, rank=1), range(50))
    cache.flush()
    assert holds(AnswerCache(tmp_path, FINGERPRINT, rank=1), range(100))
    with full_disk(1000), pytest.raises(ValueError, match=f"{tmp_path} cannot be written: .*File too large"):
        AnswerCache(tmp_path, FINGERPRINT, rank=0)
    assert not list(tmp_path.glob(".tmp-*"))


@contextmanager
def as_nobody():
    """Within this context the process lacks root's right to write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_without_permission_can_be_read_only():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to others
        os.chmod(parent, 0o755)
        folder = Path(parent) / "cache"
        writer = make(folder, range(10))
        fill(writer, range(10, 20))
        before = sorted(folder.iterdir())
        folder.chmod(0o555)
        try:
            with as_nobody():
                with pytest.raises(
                    ValueError, match=f"{folder} cannot be written: .*Permission denied.*choose anoth"
                ):
                    AnswerCache(folder, FINGERPRINT, rank=0)
                with pytest.raises(OSError, match=f"{folder} cannot take another shard: Permission denied"):
                    writer.flush()
                reader = AnswerCache(folder, FINGERPRINT, rank=0, read_only=True)
                assert holds(reader, range(10)) and holds(writer, range(20))
                with pytest.raises(ValueError, match=f"{folder} is open for reading only"):
                    reader.put(key(99), entry(99))
        finally:
            folder.chmod(0o755)
        assert sorted(folder.iterdir()) == before


def test_the_fingerprint_file_is_readable(tmp_path):
    make(tmp_path, [0])
    assert (
        json.loads((tmp_path / "fingerprint.json").read_text())
        == {"format": teacher_cache.FORMAT} | FINGERPRINT
    )
