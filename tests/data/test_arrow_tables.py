"""Tables on the disk: made once, checked, made again where they are not whole, refused without room."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pyarrow
import pytest
from harness import ROOT

from ibdistill.config.sections import DataConfig
from ibdistill.data import arrow_tables, stored_records
from ibdistill.data.arrow_tables import Making
from ibdistill.data.loading import Loaded
from ibdistill.data.ragged import Ragged
from ibdistill.data.records import Record
from ibdistill.runtime import files

KEY = {"made": ["of", 1]}


def making(numbers=(1, 2, 3), fails=None) -> Making:
    """Two blocks of numbers; `fails` is called behind the first."""

    def rows():
        yield pyarrow.record_batch({"n": pyarrow.array(np.array(numbers))})
        if fails:
            fails()
        yield pyarrow.record_batch({"n": pyarrow.array(np.array(numbers) * 10)})

    return Making(rows(), 2 * len(numbers), lambda table: {"sum": int(table.numbers("n").sum())})


def ensure(folder, key=KEY, **how) -> tuple[bool, int, list[int]]:
    is_new = arrow_tables.ensure(folder, key, lambda: making(**how))
    table = arrow_tables.opened(folder)
    return is_new, table.about["sum"], table.numbers("n").tolist()


WHOLE = 66, [1, 2, 3, 10, 20, 30]


def test_a_table_is_made_once(tmp_path):
    folder = arrow_tables.folder_of(str(tmp_path / "new" / "cache"), "numbers", KEY)
    assert ensure(folder) == (True, *WHOLE)
    assert ensure(folder, numbers=(7,)) == (False, *WHOLE)
    assert folder != arrow_tables.folder_of(str(folder.parent), "numbers", {"made": ["of", 2]})


def test_a_start_that_finds_its_tables_imports_no_pandas(tmp_path):
    """Half a second of each start; a table of token ids and one of numbers are read."""
    own = [[1, 2, 3], [], [4]]

    def rows():
        yield pyarrow.record_batch(
            {"t": pyarrow.array(own, pyarrow.large_list(pyarrow.int32())), "n": [5, 6, 7]}
        )

    folder = tmp_path / "numbers-1"
    assert arrow_tables.ensure(folder, KEY, lambda: Making(rows(), 3, lambda table: {}))
    code = (
        "import sys, pathlib\nfrom ibdistill.data import arrow_tables\n"
        "table = arrow_tables.opened(pathlib.Path(sys.argv[1]))\n"
        "print([list(map(int, t)) for t in table.tokens('t')], table.numbers('n').tolist())\n"
        "print('pandas' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == f"{own} [5, 6, 7]\nFalse\n", run.stderr


def flipped(folder):
    content = bytearray((folder / "table.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    time.sleep(0.02)  # the clock of a file system's times ticks a hundred times a second at least
    (folder / "table.arrow").write_bytes(content)


def cut_short(folder):
    os.truncate(folder / "table.arrow", 100)


def foreign(folder):
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"key": "another"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "its checksum is wrong"),
        (cut_short, "its checksum is wrong"),
        (foreign, "it was made from something else"),
        (lambda folder: (folder / "about.json").write_text("[1"), "it is damaged (JSONDecodeError"),
        (lambda folder: (folder / "about.json").unlink(), "it is damaged (FileNotFoundError"),
        (lambda folder: (folder / "table.arrow").unlink(), "it is damaged (FileNotFoundError"),
        (lambda folder: os.mkfifo(folder / "pipe"), "it is damaged (ValueError"),
    ],
    ids=["flipped", "cut-short", "foreign", "no-json", "no-about", "no-rows", "pipe"],
)
def test_a_table_that_is_not_whole_is_made_again(tmp_path, caplog, damage, said):
    ensure(tmp_path / "t")
    damage(tmp_path / "t")
    with caplog.at_level(logging.WARNING):
        assert ensure(tmp_path / "t") == (True, *WHOLE)
    assert f"is made again: {said}" in caplog.text


def test_rows_are_read_for_a_checksum_where_size_or_times_are_others(tmp_path, monkeypatch, caplog):
    read, checksum = [], files.checksum
    monkeypatch.setattr(files, "checksum", lambda path: read.append(path.parent.name) or checksum(path))
    ensure(tmp_path / "t")
    assert ensure(tmp_path / "t") == (False, *WHOLE) and read == [".tmp-t"]
    shutil.copytree(tmp_path / "t", tmp_path / "copy")
    for _ in range(2):
        assert ensure(tmp_path / "copy") == (False, *WHOLE) and read == [".tmp-t", "copy"]
    times = (tmp_path / "copy" / "table.arrow").stat()
    flipped(tmp_path / "copy")
    os.utime(tmp_path / "copy" / "table.arrow", ns=(times.st_atime_ns, times.st_mtime_ns))
    with caplog.at_level(logging.WARNING):
        assert ensure(tmp_path / "copy") == (True, *WHOLE)
    assert "copy is made again: its checksum is wrong" in caplog.text


def test_the_documented_command_removes_tables_that_no_run_has_begun_with_of_late(tmp_path):
    command = re.search(r"    (find .* -mtime \+30 .*)\n", (ROOT / "ibdistill/data/README.md").read_text())[1]
    for name in ("records-used", "records-old", ".tmp-records-killed"):
        (tmp_path / name).mkdir() if name.startswith(".") else ensure(tmp_path / name)
        os.utime(tmp_path / name, (1, 1))
    assert not ensure(tmp_path / "records-used")[0]
    subprocess.run(command.replace("FOLDER", str(tmp_path)), shell=True, check=True)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"records-used"}


def test_a_killed_making_leaves_no_table_and_no_rows(tmp_path):
    """The kernel takes the lock from a process that ends."""
    if (child := os.fork()) == 0:
        arrow_tables.ensure(tmp_path / "t", KEY, lambda: making(fails=lambda: os.kill(os.getpid(), 9)))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-t", "t.lock"]
    assert ensure(tmp_path / "t") == (True, *WHOLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "t.lock"]


def test_a_failed_making_leaves_nothing(tmp_path):
    def fail():
        raise ValueError("bad line")

    with pytest.raises(ValueError, match="bad line"):
        ensure(tmp_path / "t", fails=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["t.lock"]


def test_a_full_disk_is_said_before_it_is_filled(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"will take about 48 bytes, by its first 3 of 6 .* has 40 left; name"
    ):
        ensure(tmp_path / "t")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"data.cache_dir: '.*/file/cache' cannot be written .* name another"
    ):
        ensure(tmp_path / "file" / "cache" / "t")
    with pytest.raises(ValueError, match="all ranks of a node must see the same data.cache_dir"):
        arrow_tables.opened(tmp_path / "t")


RECORDS = [
    Record("a", "jsonl", "q\u2028 \U0001f600", "1", "r", "1", ("3", "4"), "value"),
    Record("b/sample-1", "jsonl", "", "", "", "", sample_of="b"),
    Record("c", "jsonl", "q", "1", "r", "1", history=(("user", "x", ""), ("assistant", "y", "z"))),
    Record("d", "jsonl", "q", "1", "r", "1", rationales=("r", "s")),
]


def test_records_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_tables, "BLOCK", 2)
    loaded = Loaded(RECORDS[:3], {"jsonl": RECORDS[3:], "none": []}, {"jsonl": RECORDS[1:]}, {"x": 3})
    arrow_tables.ensure(tmp_path / "t", KEY, lambda: stored_records.making(loaded))
    found = stored_records.from_table(arrow_tables.opened(tmp_path / "t"))
    assert list(found.train) == [found.train[i] for i in range(3)] == found.train[:] == RECORDS[:3]
    assert found.train[::2] == RECORDS[:3:2] and list(found.train.take([2, 0])) == [RECORDS[2], RECORDS[0]]
    assert {task: list(own) for task, own in found.valid.items()} == loaded.valid
    assert [list(own) for own in found.test.values()] == [RECORDS[1:]] and found.report == {"x": 3}
    again = Loaded([*RECORDS[:2], RECORDS[3]], loaded.valid, loaded.test, {})
    arrow_tables.ensure(tmp_path / "u", KEY, lambda: stored_records.making(again))
    assert arrow_tables.opened(tmp_path / "u").about["content"] != found.content


def test_what_records_are_made_from_changes_with_settings_and_files(tmp_path):
    def made_from(**settings):
        return stored_records.source(DataConfig(task="jsonl", path=str(tmp_path), **settings))

    file = tmp_path / "train.jsonl"
    file.write_text("{}")
    before = made_from()
    assert before == made_from(packing="on", cache_dir="x", bucket_batches=3)
    assert before != made_from(valid_share=0.2)
    times = file.stat()
    file.write_text("[]")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` leaves it
    assert made_from() != before
    file.write_text("{}")
    (tmp_path / "valid.jsonl").write_text("{}")
    assert len(made_from()["files"]) == 2
    assert "files" not in stored_records.source(DataConfig(task="jsonl", path=str(tmp_path / "none")))


def test_ragged_parts_are_one_sequence_of_sequences():
    rows = [[1, 2], [], [3], [], [], [4, 5, 6]]
    parts = [Ragged(rows[:2]), Ragged([]), Ragged(rows[2:5]), Ragged(rows[5:])]
    chained = parts[0] + parts[1] + parts[2] + parts[3]
    for ragged in (chained, Ragged.joined(parts), Ragged(rows)):
        assert [ragged[i].tolist() for i in range(len(ragged))] == rows
        assert ragged.lengths.tolist() == [2, 0, 1, 0, 0, 3] and ragged.flat.tolist() == [1, 2, 3, 4, 5, 6]
    assert len(Ragged([])) == 0 and Ragged([]).lengths.tolist() == []
