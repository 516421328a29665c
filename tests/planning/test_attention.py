"""A dry run follows the attention of the device that is planned for, not that of the machine that plans."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from ibdistill.config import sections
from ibdistill.models import fused
from ibdistill.ops import implementation
from ibdistill.planning import dryrun

SHAPES = {
    "gpt2": {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "t5": {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}


@pytest.fixture
def cpus_attention(monkeypatch) -> list[str]:
    """Gets the name of each call of the CPU's own attention."""
    calls, honest = [], fused.attention.attention

    def attention(*args, **kwargs):
        calls.append("cpu")
        return honest(*args, **kwargs)

    monkeypatch.setattr(fused.attention, "attention", attention)
    return calls


def peak(folder, device: str, question: int) -> int:
    objective = sections.ObjectiveConfig(method="dss")
    student = sections.StudentConfig(dropout=0.1)
    skeleton = dryrun.Skeleton(str(folder), "student.model", None, "bf16", student)
    return dryrun.student_step(skeleton, dryrun.Lengths(2, question, 2, 4), objective, device=device).peak


@pytest.mark.parametrize("name", SHAPES)
def test_with_dropout_a_gpus_dry_run_does_not_take_the_cpus_attention(tmp_path, cpus_attention, name):
    AutoConfig.for_model(name, **SHAPES[name]).save_pretrained(tmp_path)
    on_cpu = peak(tmp_path, "cpu", 256)
    assert cpus_attention and not implementation.on_gpu(dryrun.torch.zeros(1))
    cpus_attention.clear()
    on_gpu = peak(tmp_path, "cuda", 256)
    assert not cpus_attention and on_gpu < on_cpu


def test_gpt2_on_a_gpu_keeps_no_matrix_of_the_attention(tmp_path):
    """Twice as long takes twice the memory; a [T, T] matrix for each head would take four times its part."""
    AutoConfig.for_model("gpt2", **SHAPES["gpt2"]).save_pretrained(tmp_path)
    short, long = (peak(tmp_path, "cuda", question) for question in (124, 248))
    assert long / short < 2.1
