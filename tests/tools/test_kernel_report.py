"""The kernels compiled ahead of time, without a GPU: tools/bench/kernel_report.py passes its own checks."""

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/bench"))
import kernel_launches
import kernel_report


@pytest.mark.parametrize("V", [32128, 50257])
def test_all_checks_pass(V, capsys):
    kernel_report.main("sm_90", V)
    out = capsys.readouterr().out
    assert "all checks passed" in out and "logits, CE + paper, max                8" in out


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_narrow_load_is_found(target):
    """Given logits whose rows aren't padded: V = 50257 leaves nothing wider than 2 bytes."""
    launches = kernel_launches.record(50257, torch.bfloat16, lanes=kernel_report.TARGETS[target][2])
    compiled = kernel_report.compile_launch(launches["logits, CE + paper, max"][0], target)
    (code,) = kernel_report.machine_code([compiled], target)
    assert kernel_report.wide(code["mix"], target, *kernel_report.moves(compiled, torch.bfloat16))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", ["VID, D_t = 1024", "head, CE + paper, max + KD jsd"])
def test_targets_differ_in_lanes_and_both_pass(target, case):
    """64 lanes need blocks twice as large for the same 16 bytes per thread."""
    lanes = kernel_report.TARGETS[target][2]
    launches = kernel_launches.record(32128, torch.bfloat16, lanes=lanes)[case]
    failures = []
    kernel_report.inspect([(case, x) for x in launches], target, 32128, torch.bfloat16, failures)
    assert failures == []


@pytest.mark.parametrize("target", list(kernel_report.TARGETS))
def test_attention_compiles_for_every_target(target):
    """On sm_90 and gfx942 without spills to memory."""
    assert kernel_report.inspect_attention(target, torch.bfloat16, (64,)) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_activations_move_16_bytes_per_thread_and_spill_nothing(target):
    launches = kernel_launches.record_gates()
    assert len(launches) == 6
    compiled = [kernel_report.compile_launch(launch, target) for launch in launches]
    for code in kernel_report.machine_code(compiled, target):
        assert not code["spills"]
        widths = {name for name in code["mix"] if name.startswith(("LDG", "STG"))}
        assert widths - {"LDG.E.64"} == {"LDG.E.128", "STG.E.128"}, widths  # of 8 bytes: the seed


def test_instructions_are_those_of_each_kernel(tmp_path):
    """As NVIDIA's own tool prints them for one kernel alone."""
    launches = kernel_launches.record_gates()[-2:]
    compiled = [kernel_report.compile_launch(launch, "sm_90") for launch in launches]
    codes = kernel_report.machine_code(compiled, "sm_90")
    assert codes[0]["mix"] != codes[1]["mix"]
    for kernel, code in zip(compiled, codes, strict=True):
        (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
        printed = kernel_report.said_by("cuobjdump", "-sass", str(tmp_path / "cubin"))
        names = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]+)", printed)
        assert code["mix"] == Counter(names)


def test_token_counts_never_recompile():
    """Launches of batches with other lengths and numbers of questions are the same to the compiler."""
    keys = [
        {
            kernel_launches.key_of(x)
            for launches in kernel_launches.record(32128, torch.bfloat16, lengths).values()
            for x in launches
        }
        for lengths in [(3, 3), (1,), (16,) * 16, (7, 1, 5)]
    ]
    assert all(k == keys[0] for k in keys)
    keys = [
        {kernel_launches.key_of(x) for x in kernel_launches.record_attention(T=T)} for T in (1, 7, 96, 128)
    ]
    assert all(k == keys[0] for k in keys)
