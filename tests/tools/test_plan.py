"""The planner's command: what it prints and writes, how it sums up, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from harness import ROOT
from plan import accelerators, costs, planner
from plan.accelerators import ACCELERATORS
from plan.planner import FILES, Planner

from ibdistill.config import sections
from ibdistill.config.load import load_settings
from ibdistill.config.zero_file import DS_CONFIGS
from ibdistill.planning import footprint
from ibdistill.runtime.hardware import GIB

sys.path.insert(0, str(ROOT / "tools"))
from plan import command

H100 = ACCELERATORS["h100-80g"]


def tiny(**more) -> sections.Config:
    given = {"student.model": "demo-student", "teacher.model": "demo-teacher", "teacher.placement": "replica"}
    return load_settings(None, given | {"objective.method": "ib+kd", "optim.batch_size": 64} | more)


@pytest.fixture(scope="module")
def small() -> Planner:
    return Planner(tiny(), H100, 1, 8, question=20, label=3, rationale=9)


def test_a_recipe_is_planned_and_written(tmp_path):
    line = f"demo --nodes 2 --gpus-per-node 4 --out {tmp_path / 'to'} --tokens.question 40 --tokens.label 9"
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), *line.split()]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    for file in FILES:
        assert len(re.findall(rf"^none +{file}(?: +[\d.]+){{5}}$", run.stdout, re.M)) == 1
        assert len(re.findall(rf"^none +{file}(?:\+c)? .* s/step, bound by ", run.stdout, re.M)) == 1
    assert run.stdout.count(": fits, margin") == 2 * len(FILES)
    chosen = re.search(r"^Recommended: (\w+), teacher none, micro-batches of (\d+)", run.stdout, re.M)
    content = json.loads((tmp_path / "to" / "ds_config.json").read_text())
    assert content == json.loads((DS_CONFIGS / f"{chosen[1]}.json").read_text())
    submit = (tmp_path / "to" / "submit.sh").read_text()
    assert submit.splitlines()[1] in run.stdout
    assert "sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/distill.sh demo " in submit
    settings = dict(re.findall(r"--(\S+\.\S+) (\S+)", submit))
    loaded = load_settings("demo", settings)  # the settings are ones that a run takes
    assert loaded.optim.batch_size % (8 * loaded.optim.micro_batch_size) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"gpu": "h900"},
            "--gpu is 'h900'; known are a100-40g, a100-80g, h100-80g, h200-141g, l40s-48g, l4-24g",
        ),
        ({"rates.speed": 3}, "unknown figure rates.speed; there are bandwidth_gbs, fp32_tflops"),
        ({"rates.usable": 3}, "rates.usable is 3.0; it must be in (0, 1]"),
        ({"rates.tflops": "fast"}, "rates.tflops is 'fast'; it must be a number above 0"),
        ({"tokens.question": 0}, "tokens.question is 0; it must be a whole number of at least 1"),
        ({"tokens.answer": 5}, "unknown length tokens.answer; there are question, label, rationale"),
        ({"nodes": 0}, "--nodes is 0; it must be a whole number of at least 1"),
        ({"gpus_per_node": 5}, "optim.batch_size is 16; it must be a multiple of the 5 ranks"),
        ({"student.model": "/no/such"}, "student.model is '/no/such': no preset"),
        ({"student.modle": "t5-mini"}, "unknown setting 'student.modle'. Did you mean student.model"),
    ],
)
def test_bad_input_is_named(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.main("demo", **given)


def test_a_configuration_that_lacks_a_size_is_named(tmp_path):
    sizes = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_attention_heads": 0}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(
        ValueError, match=r"student\.model is '.*': no model can be built from its configuration"
    ):
        footprint.student_skeleton(tiny(**{"student.model": str(tmp_path)}))


def test_micro_batches_divide_a_ranks_questions(small):
    assert small.micro_batch_sizes() == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="must be a multiple of the 24 ranks"):
        small.on(3, 8, 64)
    with pytest.raises(ValueError, match="multiple of optim.micro_batch_size x ranks = 3 x 8 = 24"):
        Planner(tiny(**{"optim.micro_batch_size": 3}), H100, 1, 8, 20, 3, 9).micro_batch_sizes()


def with_room(planned: Planner, room: float) -> Planner:
    """The same plan on GPUs with so many usable bytes."""
    other = planned.on(planned.nodes, planned.on_node, planned.config.optim.batch_size)
    other.gpu = dataclasses.replace(H100, memory_gib=room / GIB, usable=1.0)
    return other


def test_the_peak_is_the_states_and_the_largest_of_what_comes_and_goes(small):
    asked = "zero3", "zero3", False, 8
    choice = small.choice(*asked)
    assert choice.bytes == sum(choice.states.values()) + max(choice.activations.values())
    assert with_room(small, choice.bytes + 100).choice(*asked).fits
    assert not with_room(small, choice.bytes - 100).choice(*asked).fits


def test_the_hosts_memory_counts_too(small):
    offloaded = small.choice("cpu_offload", "zero2_offload", False, 8)
    assert offloaded.fits and offloaded.host > 0
    poor = small.on(1, 8, 64)
    poor.gpu = dataclasses.replace(H100, host_memory_gib=8 * (offloaded.host - 100) / GIB)
    assert not poor.choice("cpu_offload", "zero2_offload", False, 8).fits
    assert poor.choice("replica", "zero2", False, 8).fits


def test_what_is_recommended_fits_and_is_among_the_fastest(small):
    best = small.best()
    fitting = [c for size in small.micro_batch_sizes() for c in small.choices(size) if c.fits]
    assert best.fits and best.step <= planner.ABOUT * min(c.step for c in fitting if not c.offloads)
    assert not best.checkpointing and best.placement == "replica"  # nothing to gain from anything else
    nothing = with_room(small, 1e6)
    assert nothing.best() is None
    assert nothing.smallest().bytes == min(c.bytes for c in nothing.choices(1))


def test_a_larger_micro_batch_is_traced_as_it_is_extrapolated(small):
    """A straight line through one and two questions, against a trace of eight."""
    from ibdistill.planning import dryrun

    asked = {"wanted": small.wanted, "teacher_head": small.teacher.head}
    traced = dryrun.student_step(small.student, dryrun.Lengths(8, 20, 3, 9), small.config.objective, **asked)
    one, two = small._traces[False]
    assert one.at_head + 7 * (two.at_head - one.at_head) == pytest.approx(traced.at_head, rel=0.02)


def test_seconds_by_hand():
    """Products of 4 s, transfers of 3 s beside them, and what can't overlap."""
    load = costs.Load(
        operations=costs.Operations(student=300.0, head=100.0, teacher=200.0),
        micro_batches=2,
        student_bytes=10,
        teacher_bytes=2000,
        reduced=30.0,
        gathered=20.0,
        teacher_gathered=60.0,
        updated=5,
        overlaps_reduction=True,
        overlaps_gathers=False,
    )
    rates = costs.Rates(products=100.0, teacher_products=200.0, memory=1000.0, link=2.0, teacher_link=10.0)
    parts = costs.step_seconds(load, rates)
    assert parts == pytest.approx(
        {
            "student": 6.0,
            "head": 2.0,
            "teacher": 4.0,  # reading 2000 bytes twice takes longer than 400 operations
            "gradients wait": 15.0 - 8.0,
            "parameters wait": 10.0,
            "teacher wait": 6.0 - 4.0,
            "optimizer": 0.14,
        }
    )
    assert costs.bound(parts) == "parameters wait"
    assert costs.efficiency(parts) == pytest.approx(12 / 31.14)
    moving = costs.step_seconds(dataclasses.replace(load, moved=500.0), rates)
    assert moving["student"] == pytest.approx(7.0)
    alone = costs.step_seconds(load, dataclasses.replace(rates, overlap=False))
    assert alone["gradients wait"] == 15.0 and alone["teacher wait"] == 6.0


def test_what_ranks_send_around_a_ring():
    assert costs.sent({"all_gather": 800, "reduce_scatter": 800, "all_reduce": 800}, 4) == 600 + 600 + 1200
    assert costs.sent({"all_reduce": 800}, 1) == 0


def test_links_of_a_job():
    """NVLink within a node, the network beyond; a teacher that is sharded within nodes stays on NVLink."""
    link = {}
    for ranks, placement in ((8, "zero3"), (16, "zero3"), (16, "zero3_node")):
        rates = costs.Rates.of(H100, ranks, 8, placement, "bf16", "bf16")
        link[ranks, placement] = rates.link, rates.teacher_link
    assert link == {
        (8, "zero3"): (450e9, 450e9),
        (16, "zero3"): (50e9, 50e9),
        (16, "zero3_node"): (50e9, 450e9),
    }


def test_a_gpus_figures_can_be_replaced():
    given = accelerators.accelerator("h100-80g", {"memory_gib": 94})
    assert given.memory_gib == 94 and given.tflops == H100.tflops and "memory_gib 94 given" in given.source


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("google-t5/t5-base", 0.2229),  # arXiv 1910.10683, section 3.7: 220 million
        ("google-t5/t5-11b", 11.307),
        ("Qwen/Qwen2.5-0.5B", 0.494),  # its model card
        ("Qwen/Qwen2.5-72B", 72.7),  # its model card
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("meta-llama/Llama-3.1-405B", 405.85),  # its model card: 406 billion
    ],
)
def test_published_shapes_have_their_published_number_of_parameters(name, billions):
    skeleton = footprint.student_skeleton(tiny(**{"student.model": name}))
    assert sum(n for n, _ in skeleton.sizes()) / 1e9 == pytest.approx(billions, rel=1e-3)
