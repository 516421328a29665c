"""The kernels compiled ahead of time, without a GPU: tools/kernel_report.py passes its own checks."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

PATH = Path(__file__).parents[2] / "tools/kernel_report.py"
spec = importlib.util.spec_from_file_location("kernel_report", PATH)
kernel_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_report)


@pytest.mark.parametrize("V", [32128, 50257])
def test_all_checks_pass(V, capsys):
    kernel_report.main("sm_90", V)
    out = capsys.readouterr().out
    assert "all checks passed" in out and "logits, CE + paper, max                8" in out


def test_a_narrow_load_is_found(capsys):
    """Given logits whose rows aren't padded: V = 50257 leaves nothing wider than 2 bytes."""
    launches = kernel_report.record(50257, torch.bfloat16)["logits, CE + paper, max"]
    compiled = kernel_report.compile_launch(launches[0], "sm_90")
    code = kernel_report.machine_code(compiled, "sm_90")
    assert kernel_report.wide(code["mix"], "sm_90", *kernel_report.moves(compiled, torch.bfloat16))


def test_token_counts_never_recompile():
    """Launches of batches with other lengths and numbers of questions are the same to the compiler."""
    keys = [
        {
            (x.kernel.__name__, str(kernel_report.constants_of(x)), kernel_report.shapes_of(x))
            for launches in kernel_report.record(32128, torch.bfloat16, lengths).values()
            for x in launches
        }
        for lengths in [(3, 3), (1,), (16,) * 16, (7, 1, 5)]
    ]
    assert all(k == keys[0] for k in keys)
