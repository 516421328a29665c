"""Writing files: the old content or the new, whatever happens in between."""

from __future__ import annotations

import functools
import json
import os
import stat
import threading
import zlib

import pytest
from harness import full_disk

from ibdistill.runtime import files


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomically(path, b"old")
    files.write_atomically(path, "n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode() and list(tmp_path.iterdir()) == [path]
    files.write_json(path, {"name": "\u00e9", "n": [1]})
    assert json.loads(path.read_text()) == {"name": "\u00e9", "n": [1]} and "\u00e9" in path.read_text()


def test_what_is_no_file_and_no_folder_is_refused(tmp_path):
    (tmp_path / "run/deep").mkdir(parents=True)
    (tmp_path / "run/deep/file").touch()
    for name, target in {"dangling": "nowhere", "folder": "deep", "file": "deep/file", "up": ".."}.items():
        (tmp_path / "run" / name).symlink_to(target)
    (tmp_path / "link").symlink_to("run")
    for path in ("run", "link", "run/deep/file", "run/nothing"):
        files.refuse_special(tmp_path / path)
    special = tmp_path / "run/deep/special"
    with_socket = functools.partial(os.mknod, mode=stat.S_IFSOCK | 0o600)
    for make in (os.mkfifo, with_socket, lambda path: path.symlink_to("/dev/null")):
        make(special)
        for path in ("run", "link", "run/deep/special"):
            with pytest.raises(ValueError, match="deep/special is a named pipe, a device or a socket, and"):
                files.refuse_special(tmp_path / path)
        special.unlink()


def test_a_folder_that_another_rank_makes_meanwhile_is_no_device(tmp_path):
    ended = threading.Event()

    def make_and_remove() -> None:
        while not ended.is_set():
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder").rmdir()

    other_rank = threading.Thread(target=make_and_remove)
    other_rank.start()
    try:
        for _ in range(20_000):
            files.refuse_special(tmp_path / "folder")
    finally:
        ended.set()
        other_rank.join()


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    files.write_atomically(path, b"old")
    with full_disk(100), pytest.raises(OSError):
        files.write_atomically(path, bytes(4096))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.bin", []
    fsync = os.fsync

    def noted(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append((os.path.isdir(target), os.path.basename(target)[:5], path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files.write_atomically(path, b"new")
    assert seen == [(False, files.TEMPORARY, False), (True, tmp_path.name[:5], True)]


def test_a_digest_has_the_size_asked_for_and_never_changes():
    assert files.digest(b"abc").hex() == "d8bb14d833d59559"
    assert len(files.digest(b"abc", 16)) == 16 and files.digest(b"abd") != files.digest(b"abc")


def test_a_checksum_is_that_of_the_whole_content(tmp_path):
    content = bytes(range(256)) * 40_000  # more than is read at a time
    (tmp_path / "a").write_bytes(content)
    assert files.checksum(tmp_path / "a") == zlib.crc32(content)
    (tmp_path / "b").write_bytes(b"")
    assert files.checksum(tmp_path / "b") == 0


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path):
    target = tmp_path / "there" / "a"
    with files.folder_replaced(target) as folder:
        (folder / "one").write_text("1")
    assert (target / "one").read_text() == "1"
    with pytest.raises(RuntimeError), files.folder_replaced(target) as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["one"]
    with files.folder_replaced(target) as folder:
        (folder / "three").write_text("3")
    assert [path.name for path in target.iterdir()] == ["three"]
    (tmp_path / "link").symlink_to(target)
    with files.folder_replaced(tmp_path / "link") as folder:
        (folder / "four").write_text("4")
    assert (tmp_path / "link").is_symlink() and [path.name for path in target.iterdir()] == ["four"]
    assert list((tmp_path / "there").iterdir()) == [target]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"), files.folder_replaced(tmp_path / "file"):
        raise AssertionError("the block must not run")
