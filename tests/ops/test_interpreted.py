"""The kernels' tests in Triton's interpreter, where there is no GPU.

In a process of their own: Triton reads TRITON_INTERPRET when it is imported, and here it is imported without,
to compile. It is one process, as its start takes 5 s of CPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import alone

FILES = (
    "test_head_loss_triton.py",
    "test_vid_triton.py",
    "test_biased_attention_triton.py",
    "test_gates_triton.py",
)


@pytest.fixture(scope="module")
def run():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rpfEsxX"]
    command += [str(Path(__file__).with_name(file)) for file in FILES]
    return subprocess.run(command, capture_output=True, text=True, env=alone() | {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_pass_in_the_interpreter(run, file):
    assert run.returncode == 0, run.stdout[-8000:]
    results = re.findall(rf"^([A-Z]+) .*/{re.escape(file)}", run.stdout, re.M)
    assert set(results) == {"PASSED"}, run.stdout[-8000:]
