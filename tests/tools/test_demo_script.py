"""tools/demo.sh asks for as many ranks as the machine has GPUs for; nothing is installed or trained here."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from harness import ROOT


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_ranks_of_the_demo(tmp_path, gpus, ranks):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/demo.sh", tmp_path / "tools")
    (tmp_path / "tools/setup.sh").write_text("")
    programs = {
        "python": f'[ "$1" = -c ] && echo {gpus} || true',
        "deepspeed": f'echo "$@" >> {tmp_path}/asked',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    # grep finds no line of a log in what the stand-in says, which is no failure of the run
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "tools/demo.sh"], cwd=tmp_path, env=environment, check=True, timeout=60)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 5 and all(x.startswith(f"--num_gpus {ranks} ibdistill/train.py ") for x in asked)
