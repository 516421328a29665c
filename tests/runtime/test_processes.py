"""What /proc says about processes."""

from __future__ import annotations

import os
import subprocess
import sys

from ibdistill.runtime import processes


def test_a_process_is_known_by_its_words_parent_and_start():
    child = subprocess.Popen([sys.executable, "-c", "input()", "a b", ""], stdin=subprocess.PIPE)
    try:
        words = processes.command_line(child.pid)
        assert words == [] or words[1:] == ["-c", "input()", "a b", ""]  # none yet, before it is executed
        assert processes.parent_of(child.pid) == os.getpid()
        assert processes.start_time(child.pid) >= processes.start_time(os.getpid()) > 0
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.start_time(child.pid) is None  # it has ended, though nobody has asked yet
    child.wait()
    assert processes.parent_of(child.pid) is None and processes.command_line(child.pid) == []


def test_this_process_shares_its_namespace_with_its_children():
    code = "from ibdistill.runtime import processes; print(processes.namespace())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == processes.namespace() != ""
