"""The kernels' tests in Triton's interpreter, where there is no GPU.

In processes of their own: Triton reads TRITON_INTERPRET when it is imported, and here it is imported without,
to compile.
"""

import os
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


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_pass_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    run = subprocess.run(command, capture_output=True, text=True, env=alone() | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1], run.stdout[-500:]
