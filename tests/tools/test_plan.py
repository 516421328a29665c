"""The planner's command: what it prints and writes, how it sums up, what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import re
import runpy
import sys
from unittest import mock

import pytest
import tiny_models
from harness import ROOT
from plan import accelerators, checkpoints, command, costs, lengths, planner, step_time, summary
from plan.accelerators import ACCELERATORS
from plan.choice import Choice
from plan.planner import FILES, Planner
from torch.utils.flop_counter import FlopCounterMode

from ibdistill.config import sections
from ibdistill.config.load import load_settings
from ibdistill.config.zero_file import DS_CONFIGS
from ibdistill.data import tokenizers
from ibdistill.data.tasks import demo_words
from ibdistill.models import forward
from ibdistill.planning import footprint
from ibdistill.planning.dryrun import Lengths
from ibdistill.planning.footprint import Zero
from ibdistill.runtime.hardware import GIB
from ibdistill.training import tables

H100 = ACCELERATORS["h100-80g"]


GIVEN = lengths.MeasuredLengths(20, 3, 9, "given")


def tiny(**more) -> sections.Config:
    given = {"student.precision": "fp32"}
    given |= {
        "student.model": "demo-student",
        "teacher.model": "demo-teacher",
        "teacher.placement": "replica",
    }
    return load_settings(None, given | {"objective.method": "ib+kd", "optim.batch_size": 64} | more)


@pytest.fixture(scope="module")
def small() -> Planner:
    return Planner(tiny(), H100, 1, 8, question=20, label=3, rationale=9)


def printed(arguments: str) -> str:
    """What the command prints. It runs in this process, whose imports it needs."""
    script, out = str(ROOT / "tools/plan.py"), io.StringIO()
    with mock.patch.object(sys, "argv", [script, *arguments.split()]), contextlib.redirect_stdout(out):
        runpy.run_path(script, run_name="__main__")
    return out.getvalue()


def test_a_recipe_is_planned_and_written(tmp_path):
    out = printed(
        "demo --nodes 2 --gpus-per-node 4 --tokens.question 40 --tokens.label 9 --all "
        f"--out {tmp_path / 'to'}"
    )
    first = re.match(
        r"Recommended for 2 x 4 h100-80g, 16 questions per step: (\w+), micro-batches of \d\n", out
    )
    recommendation, everything = out.split("\n\n", 1)
    assert len(recommendation.splitlines()) <= 10 and "[" not in everything
    for file in FILES:
        assert len(re.findall(rf"^none +{file}(?: +[\d.]+){{5}}$", everything, re.M)) == 1
        speed = rf"^none +{file}(?:\+c)?(?: +[\d.]+){{5}}  \S+ s per step \(predicted\), bound by "
        assert len(re.findall(speed, everything, re.M)) == 1
    assert everything.count(": fits, margin") == 2 * len(FILES)
    content = json.loads((tmp_path / "to" / "ds_config.json").read_text())
    assert content == json.loads((DS_CONFIGS / f"{first[1]}.json").read_text())
    submit = (tmp_path / "to" / "submit.sh").read_text()
    assert submit.splitlines()[1] in recommendation
    assert "sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/distill.sh demo " in submit
    settings = dict(re.findall(r"--(\S+\.\S+) (\S+)", submit))
    loaded = load_settings("demo", settings)  # the settings are ones that a run takes
    assert loaded.optim.batch_size % (8 * loaded.optim.micro_batch_size) == 0


def test_no_recipe_and_folders_with_nothing_but_a_configuration(tmp_path):
    """What was given and is replaced is named; so is where shapes and lengths are from."""
    sizes = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    for name, layers in (("student", 1), ("teacher", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes | {"num_hidden_layers": layers}))
    out = printed(
        f"--student.model {tmp_path / 'student'} --teacher.model {tmp_path / 'teacher'} --tokens.question 20 "
        "--tokens.label 3 --tokens.rationale 9 --gpus-per-node 4 --teacher.placement zero3 "
        "--deepspeed.config zero3"
    )
    assert len(out.splitlines()) <= 12
    labels = [line.split()[0] for line in out.splitlines()[1:]]
    expected = "fits speed saving faster roomier replaced models lengths assumed submit more"
    assert labels == expected.split()
    assert re.search(r"^Recommended .*: zero2, teacher replica, micro-batches of 16$", out, re.M)
    assert "replaced  deepspeed.config zero3 by zero2, teacher.placement zero3 by replica. As given: " in out
    assert re.search(r"As given: \S+ s per step, (\d+% (slower|faster)|predicted to be as fast); fits: ", out)
    # 512 x 64 embeddings; a layer: q, k, v with biases, o, three matrices of the MLP, two norms
    layer = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    for name, layers in (("student", 1), ("teacher", 2)):
        count = (512 * 64 + layers * layer + 64) / 1e6
        assert f"{name} {tmp_path / name} ({count:.1f} million parameters" in out
    assert out.count("its folder's config.json, all that planning needs") == 2
    assert "lengths   question 20, label 3, rationale 9 tokens: question, label, rationale as given" in out
    assert "assumed   objective.method ib" in out and "slurm/distill.sh --" in out


@pytest.fixture
def data(tmp_path):
    records = [{"question": "a b " * n, "label": "x", "rationale": "c " * n} for n in range(1, 21)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(text)
    return {"data.task": "jsonl", "data.path": str(tmp_path), "objective.method": "dss"}


def test_lengths_come_from_the_data(data, tmp_path):
    """By the tokenizer where there is one, else by words; not beyond the limits; what is given wins."""
    counted = lengths.settle(load_settings(None, data | {"data.max_rationale_tokens": 18}), {})
    # one id per word and one for the end; "predict:" is one word and "explain:" another, of equal length
    assert (counted.question, counted.label, counted.rationale) == (42, 2, 18)
    assert "longest of 20 records" in counted.source and "student's tokenizer" in counted.source
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    words = load_settings(None, data | {"student.model": str(tmp_path / "model")})
    guessed = lengths.settle(words, {"label": 7})
    assert (guessed.question, guessed.label, guessed.rationale) == (round(1.5 * 41) + 1, 7, 31)
    assert guessed.source.startswith("label as given; else the longest") and "words x 1.5" in guessed.source
    limits = lengths.settle(load_settings(None, {}), {})
    assert (limits.question, limits.label) == (1024, 64) and "give data.path" in limits.source


@pytest.mark.parametrize("method", ["dss", "cot"])
def test_the_bytes_of_tables_are_those_on_the_disk(method, world, tmp_path):
    """Within 5 %, of 3,000 records; so are the arrays that a rank holds, which memory maps are none of."""
    drawn = random.Random(0)
    with (tmp_path / "data.jsonl").open("w") as file:
        for i in range(3000):
            texts = [" ".join(drawn.choices(demo_words.OBJECTS, k=k)) for k in (20, drawn.randint(20, 90))]
            row = {"question": texts[0], "label": f"n{i % 8}", "rationale": texts[1]}
            file.write(json.dumps(row) + "\n")
    given = {"data.task": "jsonl", "data.path": str(tmp_path / "data.jsonl"), "objective.method": method}
    given |= {"data.answer_marker": "predict:"} if method == "cot" else {}
    config = load_settings(None, given | {"data.cache_dir": str(tmp_path / "cache")})
    planned = lengths.settle(config, {}).stored
    records = tables.load(config.data, world, needs_rationale=True)
    made = tables.tokenize(config, records, tokenizers.demo_tokenizer(), world)
    for kind, size in (("tokens", planned.ids), ("records", planned.texts)):
        real = next((tmp_path / "cache").glob(f"{kind}-*/table.arrow")).stat().st_size
        assert abs(size - real) < 0.05 * real, (kind, size, real)
    assert planned.records == len(records.train) == len(made.records.train)
    ids = (*made.features.questions.values(), *made.features.targets.values())
    arrays = [made.records.train._indices, made.features.groups, *(table.lengths for table in ids)]
    assert abs(planned.numbers - sum(array.nbytes for array in arrays)) <= 8 * len(records.train)  # samples
    counts = {"question": 20, "label": 3, "rationale": 9, "records": 1000}
    alone = lengths.settle(tiny(), counts).stored
    assert alone.ids == 1000 * (16 + 8 * 8 + 4 * (2 * 20 + 3 + 9)) and alone.texts == 1000 * (78 + 4 * 35)
    said = summary.stored(dataclasses.replace(alone, ids=GIB, texts=GIB // 2, numbers=GIB // 4))
    assert said.startswith("1.50 GiB on the disk of each node") and "1.00 of token ids, 0.50 of texts" in said
    with pytest.raises(ValueError, match=r"tokens.records is 0; it must be a whole number of at least 1"):
        lengths.settle(tiny(), {"records": 0})


def made(small, **changes) -> Choice:
    """A choice of so many bytes and seconds."""
    seconds = {"student": changes.pop("step", 1.0)}
    sizes = {"states": {"student": changes.pop("bytes", 10)}, "activations": {"student": 0}}
    return dataclasses.replace(
        small.choice("replica", "zero2", False, 8), seconds=seconds, room=100, host=0, **sizes, **changes
    )


def test_why_not_another(small):
    """The next faster and the next roomier choice, by hand."""
    best = made(small, step=1.0, bytes=50)
    assert summary.faster([best], best).startswith("nothing: no choice is predicted to be faster")
    close = made(small, step=0.95, file="zero1")
    why = summary.faster([best, close], best)
    assert why.startswith(
        "zero1, teacher replica, micro-batches of 8: 0.95 s, 5% faster; not taken: within 10%"
    )
    huge, large = made(small, step=0.5, bytes=1000), made(small, step=0.8, bytes=120)
    assert "0.8 s, 20% faster; does not fit" in summary.faster([best, huge, large], best)
    assert summary.roomier([best, huge], best) == "nothing frees more than 5% of the GPU"
    small_, slow = made(small, step=1.3, bytes=30), made(small, step=2.0, bytes=5)
    assert "1.3 s per step, 30% slower" in summary.roomier([best, slow, small_], best)


def test_nothing_fits(small):
    lines = summary.summary(with_room(small, 1e6), with_room(small, 1e6).options(), "h100-80g", GIVEN)
    assert lines[0].startswith("Nothing fits 1 x 8 h100-80g") and "too much" in lines[1]


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
        ({"gpus_per_node": 17}, "optim.batch_size is 16, which leaves some of the 17 ranks without a quest"),
        ({"student.model": "/no/such"}, "student.model is '/no/such': no preset"),
        ({"student.modle": "t5-mini"}, "unknown setting 'student.modle'. Did you mean student.model"),
    ],
)
def test_bad_input_is_named(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.main("demo", **given)


def test_settings_reach_the_plan_as_they_are_typed(monkeypatch):
    """Text stays text: a number, a comment sign or brackets in a path are part of the path."""
    given = {}
    monkeypatch.setattr(command, "main", lambda recipe, **rest: given.update(rest, recipe=recipe))
    typed = {"run.dir": "run#1", "student.model": "(v2)", "data.path": "10", "data.task": "a,b"}
    numbers = ["--nodes", "2", "--gpus-per-node=4", "--rates.tflops", "1e3", "--tokens.label", "9", "--all"]
    command.from_command_line(
        ["demo", *(part for name, text in typed.items() for part in (f"--{name}", text)), *numbers]
    )
    rest = {"recipe": "demo", "nodes": 2, "gpus_per_node": 4, "rates.tflops": 1000.0, "tokens.label": 9}
    assert given == typed | rest | {"all": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo more", "unexpected arguments ('more',); settings are given as --section.field value"),
        ("demo --nodes two", "--nodes is 'two'; it must be a whole number of at least 1"),
        ("demo --nodes", "--nodes is True; it must be a whole number of at least 1"),
        ("demo --rates.tflops fast", "rates.tflops is 'fast'; it must be a number above 0"),
        ("demo --tokens.label 1.5", "tokens.label is '1.5'; it must be a whole number of at least 1"),
        ("--all demo", "--all is 'demo'; it takes no value, so give it last"),
        ("demo --gpu", "--gpu is given without a value"),
        ("demo --colour red", "unknown setting 'colour'"),
    ],
)
def test_a_bad_command_line_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.from_command_line(arguments.split())


@pytest.mark.parametrize(
    ("size", "what"),
    [
        # the configuration itself divides by the number of heads
        ({"num_attention_heads": 0}, "no model could be loaded: .*ZeroDivisionError"),
        ({"intermediate_size": -4}, "no model can be built from its configuration"),
    ],
)
def test_a_configuration_that_lacks_a_size_is_named(tmp_path, size, what):
    sizes = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4} | size
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match=rf"student\.model is '.*': .*{what}"):
        footprint.student_skeleton(tiny(**{"student.model": str(tmp_path)}))


def test_micro_batches_divide_a_ranks_questions(small):
    assert small.micro_batch_sizes() == [8, 4, 2, 1]
    assert small.on(3, 8, 64).micro_batch_sizes() == [3]  # 16 ranks with 3 questions and 8 with 2
    assert Planner(tiny(**{"optim.micro_batch_size": 3}), H100, 1, 8, 20, 3, 9).micro_batch_sizes() == [3]
    with pytest.raises(ValueError, match="optim.micro_batch_size is 1, and optim.batch_size 64 does not div"):
        Planner(tiny(**{"optim.micro_batch_size": 1}), H100, 3, 8, 20, 3, 9).micro_batch_sizes()


def test_a_step_of_tokens_is_planned_as_the_questions_that_it_holds():
    """Two streams of 20 question tokens and 3 + 9 target tokens: 52 tokens for each question."""
    tokens = {"optim.batch_size": 64, "optim.tokens_per_batch": 8 * 52 * 10 + 51}
    planned = Planner(tiny(**tokens), H100, 1, 8, 20, 3, 9)
    assert (planned.per_rank, planned.micro_batch_sizes()) == (10, [10, 5, 2, 1])
    tokens["optim.tokens_per_forward"] = 52 * 5 + 7
    split = Planner(tiny(**tokens), H100, 1, 8, 20, 3, 9)
    assert (split.per_rank, split.micro_batch_sizes()) == (10, [5])


def test_ranks_that_share_sequences_share_operations_and_activations():
    given = {"student.model": "demo-student-decoder", "teacher.model": "demo-teacher-decoder"}
    given |= {"objective.method": "cot+kd", "data.packing": "on"}
    alone, shared = (
        Planner(tiny(**given, **{"optim.sequence_parallel": n}), H100, 1, 8, 1200, 400, 2400) for n in (1, 4)
    )
    assert (alone.per_rank, shared.per_rank) == (8, 32)
    whole, part = (planner.traces.operations(True, 2) for planner in (alone, shared))
    for name in ("student", "head", "teacher"):
        assert getattr(whole, name) == pytest.approx(4 * getattr(part, name), rel=2e-3)
    peaks = [planner.traces._student_steps(True)[0].peak for planner in (alone, shared)]
    assert peaks[0] == pytest.approx(4 * peaks[1], rel=0.05)
    assert peaks[1] <= shared.traces.living(True, 1) < peaks[0]
    choices = [planner.choice("replica", "zero2", True, 2) for planner in (alone, shared)]
    assert choices[0].states == choices[1].states
    assert "all_to_all" not in choices[0].traffic and choices[1].seconds["exchange wait"] > 0
    assert choices[1].traffic["all_to_all"] == 16 * shared.traces.exchanged(True, 2)[1]
    assert shared.placements() == ("replica",)
    with pytest.raises(ValueError, match="'demo-student' is an encoder-decoder"):
        Planner(tiny(**{"data.packing": "on", "optim.sequence_parallel": 2}), H100, 1, 8, 20, 3, 9)


def test_a_loss_that_compares_questions_has_one_micro_batch_per_rank():
    """Smaller ones would be another loss, which `train.py` refuses."""
    infonce = {"objective.method": "ib+kd", "objective.estimator": "infonce"}
    planned = Planner(tiny(**infonce), H100, 1, 8, 20, 3, 9)
    assert planned.micro_batch_sizes() == [8]
    assert {choice.micro_batch_size for choice in planned.options()} == {8}
    whole = Planner(tiny(**infonce, **{"optim.micro_batch_size": 8}), H100, 1, 8, 20, 3, 9)
    assert whole.micro_batch_sizes() == [8]
    with pytest.raises(
        ValueError, match=r"infonce.* splits the 64 of optim\.batch_size into 2 micro-batches"
    ):
        Planner(tiny(**infonce, **{"optim.micro_batch_size": 4}), H100, 1, 8, 20, 3, 9).micro_batch_sizes()


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

    asked = {"wanted": small.traces.wanted, "teacher_head": small.teacher.head}
    traced = dryrun.student_step(small.student, dryrun.Lengths(8, 20, 3, 9), small.config.objective, **asked)
    one, two = small.traces._student_steps(False)
    assert one.at_head + 7 * (two.at_head - one.at_head) == pytest.approx(traced.at_head, rel=0.02)


def test_seconds_by_hand():
    """Products of 4 s, transfers of 3 s beside them, and what can't overlap."""
    load = step_time.Load(
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
    rates = step_time.Rates(
        products=100.0, teacher_products=200.0, memory=1000.0, link=2.0, teacher_link=10.0
    )
    parts = step_time.step_seconds(load, rates)
    assert parts == pytest.approx(
        {
            "student": 6.0,
            "head": 2.0,
            "teacher": 4.0,  # reading 2000 bytes twice takes longer than 400 operations
            "gradients wait": 15.0 - 8.0,
            "parameters wait": 10.0,
            "teacher wait": 6.0 - 4.0,
            "exchange wait": 0.0,
            "optimizer": 0.14,
        }
    )
    assert step_time.bound(parts) == "parameters wait"
    assert step_time.efficiency(parts) == pytest.approx(12 / 31.14)
    moving = step_time.step_seconds(dataclasses.replace(load, moved=500.0), rates)
    assert moving["student"] == pytest.approx(7.0)
    alone = step_time.step_seconds(load, dataclasses.replace(rates, overlap=False))
    assert alone["gradients wait"] == 15.0 and alone["teacher wait"] == 6.0
    sharing = dataclasses.replace(load, exchanged=12.0), dataclasses.replace(rates, exchange_link=4.0)
    assert step_time.step_seconds(*sharing)["exchange wait"] == 3.0


def test_launches_cost_what_exceeds_the_rest():
    parts = {"student": 0.004, "optimizer": 0.0016}
    rates = step_time.Rates(1.0, 1.0, 1.0, 1.0, 1.0, launch=6e-6)
    load = step_time.Load(
        *(costs.Operations(1.0, 0.0, 0.0), 1, 0, 0, 0.0, 0.0, 0.0, 0, False, False), launches=5000
    )
    bound = step_time.with_launches(parts, load, rates)
    assert bound["launch wait"] == pytest.approx(0.030 - 0.0056) and step_time.bound(bound) == "launch wait"
    few = dataclasses.replace(load, launches=100)
    assert step_time.with_launches(parts, few, rates) == parts | {"launch wait": 0.0}


def test_a_checkpoint_holds_up_the_steps_for_its_copy_and_until_the_one_before_is_there():
    """100 trained and 20 frozen parameters in bf16 on 4 ranks, at 100 bytes/s to the host, 50 to the disk."""
    slow = dataclasses.replace(H100, host_gbs=1e-7, storage_gbs=5e-8, local_gbs=1.5e-7)
    sizes = [(60, True), (20, False), (40, True)]

    def of(stage, precision="bf16", ranks=4, free=10_000, on_node=0):
        rest = {"every": 10, "free": free, "on_node": on_node}
        return checkpoints.checkpoint(sizes, precision, Zero(stage), ranks, slow, **rest)

    two = of(2)
    assert (two.copied, two.bytes) == (240 + 12 * 25, 240 + 12 * 100)
    assert (two.held, two.writing) == (5.4, 28.8)
    assert two.stall(step=2.88) == pytest.approx(0.54)
    assert two.stall(step=0.88) == pytest.approx(0.54 + 2.0)  # 10 steps end 20 s before the files
    assert of(2, free=1079).stall(step=100.0) == pytest.approx(2.88) and of(2, free=1080).beside
    # through the nodes' disks, of 2 ranks that write 540 and 300 bytes: 5.6 s before the 28.8
    local = of(2, on_node=2)
    assert (local.held, local.writing) == (5.4, pytest.approx(5.6 + 28.8))
    tight = of(2, free=1079, on_node=2)
    assert (tight.held, tight.writing) == (pytest.approx(5.6), 28.8) and not tight.beside
    assert tight.stall(step=0.88) == pytest.approx(0.56 + 2.0)
    assert of(0, free=0, on_node=4).held == pytest.approx(1440 / 150)
    assert of(0).copied == of(0).bytes == 240 + 1200 and of(0, "fp32").bytes == 480 + 800
    assert (of(3).copied, of(3).bytes) == (300 + 2 * 5, 1200 + 40)


def test_a_plan_has_the_checkpoints_of_its_settings(small):
    choice = small.choice("replica", "zero2", False, 8)
    rest = choice.step - choice.seconds["checkpoint"]
    assert (
        choice.checkpoint.every == 500 and choice.seconds["checkpoint"] == choice.checkpoint.stall(rest) > 0
    )
    assert "every 500 steps, copied to the host in" in summary.saved(choice)
    other, said = small.on(1, 8, 64), []  # with the same models, which are not traced again
    other.gpu = dataclasses.replace(H100, host_memory_gib=0.01)  # no room for the copies of 8 ranks
    for local in ("", "/local"):
        other.config = tiny(**{"run.local_dir": local})
        said.append(summary.saved(other.choice("replica", "zero2", False, 8)))
    assert re.search(r"every 500 steps, written in \S+ s \(predicted\): \S+% of the time$", said[0])
    assert re.search(r"to the nodes' disks in \S+ s, copied to the run's folder in \S+ s beside", said[1])
    other.gpu, other.config = H100, tiny(**{"run.save_every": 50, "run.eval_every": 5})
    assert other.choice("replica", "zero2", False, 8).checkpoint.every == 5


def test_t5_base_with_8_questions_a_gpu_is_bound_by_its_launches():
    """At 6 us per launch the host needs about 19 ms, and the device less than 5 for the products."""
    given = {"student.model": "google-t5/t5-base", "student.precision": "auto", "teacher.placement": "none"}
    given |= {"teacher.model": "", "objective.method": "dss"}
    planned = Planner(tiny(**given), H100, 1, 8, question=64, label=8, rationale=64)
    choice = planned.choice("none", "zero2", False, 8)
    products = sum(choice.seconds.values()) - choice.seconds["launch wait"]
    assert planned.config.student.precision == "bf16" and products < 0.005
    assert step_time.bound(choice.seconds) == "launch wait" and 0.015 < choice.step < 0.025


def test_weights_of_4_and_8_bits_are_not_planned_sharded():
    """A run refuses them, in these words."""
    given = {"student.load_in_4bit": True, "student.lora_rank": 4, "teacher.load_in_8bit": True}
    planned = Planner(tiny(**given), H100, 1, 8, 20, 3, 9)
    options = planned.options()
    assert {choice.placement for choice in options} == {"replica"}
    assert {choice.file for choice in options} == {"zero0", "zero1", "zero2", "zero2_offload"}
    with pytest.raises(ValueError, match="4-bit weights are not sharded"):
        tiny(**given, **{"deepspeed.config": "zero3"})


def test_an_unknown_gpu_ends_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        printed("demo --gpu quantum")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    assert "error: --gpu is 'quantum'; known are a100-40g" in said


def test_what_ranks_send_around_a_ring():
    assert costs.sent({"all_gather": 800, "reduce_scatter": 800, "all_reduce": 800}, 4) == 600 + 600 + 1200
    assert costs.sent({"all_reduce": 800}, 1) == 0


def test_links_of_a_job():
    """NVLink within a node, the network beyond; a teacher that is sharded within nodes stays on NVLink."""
    link = {}
    for ranks, placement in ((8, "zero3"), (16, "zero3"), (16, "zero3_node")):
        rates = step_time.Rates.of(H100, ranks, 8, placement, "bf16", "bf16")
        link[ranks, placement] = rates.link, rates.teacher_link
    assert link == {
        (8, "zero3"): (450e9, 450e9),
        (16, "zero3"): (50e9, 50e9),
        (16, "zero3_node"): (50e9, 450e9),
    }


def test_a_gpus_figures_can_be_replaced():
    given = accelerators.accelerator("h100-80g", {"memory_gib": 94})
    assert given.memory_gib == 94 and given.tflops == H100.tflops and "memory_gib 94 given" in given.source


PARAMETERS = {
    "google/t5-v1_1-small": 76_961_152,  # with a head apart from the embeddings
    "google/t5-v1_1-base": 247_577_856,
    "google/t5-v1_1-xxl": 11_135_332_352,
    "google-t5/t5-base": 222_903_552,  # arXiv 1910.10683, section 3.7: 220 million
    "google-t5/t5-11b": 11_307_321_344,
    "Qwen/Qwen2.5-0.5B": 494_032_768,  # the model cards: 0.49, 1.54, 3.09, 7.61, 72.7 billion
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,  # the model cards: 0.6, 1.7, 4.0, 8.2 billion
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,  # the model cards: 1.23, 3.21, 8.03, 70.6, 406 billion
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}
"""Parameters of the published weights, shared ones counted once."""


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_published_shapes_have_their_published_number_of_parameters(name, count):
    skeleton = footprint.student_skeleton(tiny(**{"student.model": name}))
    assert sum(n for n, _ in skeleton.sizes()) == count


@pytest.mark.parametrize("model_type", tiny_models.ENCODER_DECODER_SHAPES)
def test_operations_of_an_encoder_decoder_model_are_those_that_torch_counts(model_type):
    model, streams = tiny_models.tiny(model_type, attn_implementation="eager"), ("predict", "explain")
    of_batch = Lengths(3, 17, 5, 9)
    with FlopCounterMode(display=False) as counter:
        forward.states(model, of_batch.batch(model, streams))
    assert costs.forward_operations(model, of_batch, streams) == counter.get_total_flops()


def test_a_teacher_that_reads_the_reference_too_reads_three_times():
    read = Lengths(2, 20, 3, 9)
    asked = tiny(**{"objective.kd_target": "pmi"}).objective
    assert [own.question for own in costs.readings(read, asked)] == [20, 32, 12]
    given = {"teacher.placement": "zero3", "teacher.model": "demo-teacher", "objective.method": "kd"}
    plain, more = (
        Planner(tiny(**given | {"objective.kd_target": target}), H100, 2, 8, 20, 3, 9).traces
        for target in ("teacher", "pmi")
    )
    assert (plain.readings, more.readings) == (1, 3)
    assert 2 < more.operations(False, 1).teacher / plain.operations(False, 1).teacher < 4
    assert more.teacher_living(2) > plain.teacher_living(2)


def test_a_loss_across_vocabularies_is_planned_with_its_own_memory(small):
    other = Planner(tiny(**{"objective.alignment": "text"}), H100, 1, 8, 20, 3, 9).traces
    assert small.config.objective.alignment == "none" and other.living(False, 8) > small.traces.living(
        False, 8
    )
