"""The start of an entry point: a signal that comes during the imports is not lost and does not kill."""

from __future__ import annotations

import logging
import subprocess
import sys

from harness import ROOT, output_of

from ibdistill.runtime import rank_logging, startup


def run(code: str) -> str:
    return output_of("-c", code)


def test_a_signal_during_the_imports_waits_for_the_stop_request():
    code = """
import os, signal
from ibdistill.runtime import startup
startup.hold_requeue_signal()
os.kill(os.getpid(), signal.SIGUSR1)
from ibdistill.runtime import distributed, rank_logging
distributed.init()
stop = distributed.StopRequest()
print(stop.exit_code(), stop.exit_code())
os.kill(os.getpid(), signal.SIGTERM)
print(stop.exit_code())
distributed.exit_at_once(0)  # as the entry points do
"""
    assert run(code).split()[-3:] == ["85", "85", "143"]  # DeepSpeed prints before


def test_the_training_script_holds_the_signal_before_it_imports_torch():
    code = f"""
import runpy, signal, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            import gc
            print(signal.SIGUSR1 in held, gc.isenabled())
            raise SystemExit
sys.meta_path.insert(0, Watch())
runpy.run_path({str(ROOT / "ibdistill/train.py")!r})
"""
    assert run(code).split() == ["True", "False"]


def test_garbage_of_the_imports_is_never_looked_at_again():
    code = """
import gc
from ibdistill.runtime import startup
startup.pause_garbage_collection()
print(gc.isenabled(), gc.get_freeze_count())
startup.resume_garbage_collection()
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    assert run(code).split() == ["False", "0", "True", "True"]


def test_help_is_printed_by_the_first_rank_alone():
    code = "from ibdistill.runtime import startup; startup.answer_help(lambda: 'text'); print('on')"
    printed = []
    for rank, arguments in (("0", ["--help"]), ("1", ["--help"]), ("1", [])):
        command = ["env", f"RANK={rank}", sys.executable, "-c", code, *arguments]
        printed.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert printed == [["text"], [], ["on"]]


def test_a_terminal_obeys_nothing_that_a_message_holds():
    kept = "a\tb\n\u00e9\u3042\u00a0"
    assert startup.for_terminal(kept) == kept
    assert startup.for_terminal("\x1b[31m \r\x00\x7f\x9b") == r"\x1b[31m \r\x00\x7f\x9b"


def test_logged_lines_go_through_it(capsys, monkeypatch):
    monkeypatch.setattr(rank_logging, "logger", logging.getLogger("another"))
    rank_logging.start_logging(0)
    logging.getLogger("another").warning("a %s", "\x1b]0;title")
    assert r"a \x1b]0;title" in capsys.readouterr().err
