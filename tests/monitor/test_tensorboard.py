"""What a run shows: its events in TensorBoard, the charts and columns there, the progress bar."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
from collections.abc import Iterable
from pathlib import Path

import pytest
from harness import TRAIN, as_arguments, launch, start, tiny

from ibdistill import train
from ibdistill.config.fields import to_flat
from ibdistill.config.load import load_settings
from ibdistill.config.sections import Config
from ibdistill.data.records import Record
from ibdistill.evaluation import faithfulness, report
from ibdistill.monitor import log, reporters
from ibdistill.monitor.board import Board, hyperparameters


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    return found


def test_a_board_that_continues_leaves_no_gap_and_no_double(world, tmp_path):
    for first in (0, 4):  # the first start was killed at step 7, after its checkpoint of step 4
        board = Board(tmp_path, world, first, report_to=["tensorboard"])
        for step in range(first + 1, 8 if first == 0 else 11):
            board.scalars({"loss/total": 10.0 * first + step}, step)
        board.close()
    found = [(event.step, event.value) for event in events(tmp_path / "tensorboard").Scalars("loss/total")]
    assert found == [(s, s) for s in range(1, 5)] + [(s, 40 + s) for s in range(5, 11)]


def test_a_board_keeps_layout_figures_texts_and_hyperparameters(world, tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    from ibdistill.evaluation import plots

    board = Board(tmp_path / "on", world, 0, report_to=["tensorboard"])
    board.text("config", "a: 1\n  b: 2", 0)
    board.figures({"reliability": plots.reliability([0.5], [1], "t")}, 3)
    flat = {"run.dir": "x", "run.seed": 3, "optim.lr": 0.1, "data.path": None, "student.lora_targets": ["q"]}
    flat |= {"objective.method": "ib", "objective.alpha": 0.5, "objective.beta": 0.1}
    defaults = flat | {
        "run.dir": "",
        "optim.lr": 0.2,
        "data.path": "y",
        "run.seed": 0,
        "objective.beta": None,
    }
    scores = {"valid_demo_accuracy": 0.4, "valid_demo_brier": 0.2, "test_demo_accuracy": 0.5}
    scores |= {"test_demo_rationale_accuracy": 0.6, "test_demo_ece": 0.1, "test_demo_first_token_ece": 0.1}
    board.summary(hyperparameters(flat, defaults), {f"eval/{name}": value for name, value in scores.items()})
    board.close()
    found = events(tmp_path / "on/tensorboard")
    assert {"config/text_summary", "custom_scalars__config__"} <= set(found.Tags()["tensors"])
    assert found.Images("reliability")[0].step == 3
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    written = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    changed = ["objective.method", "run.seed", "optim.lr", "data.path", "objective.beta"]
    assert set(written) == {"test_demo_accuracy", "valid_demo_accuracy", *changed}
    assert written["data.path"].string_value == "None" and written["optim.lr"].number_value == 0.1
    content = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    names = [column.name for column in columns.hparam_infos]
    assert names == ["test_demo_accuracy", "valid_demo_accuracy", *changed]
    assert {column.name.tag for column in columns.metric_infos} == {
        "eval/valid_demo_accuracy",
        "eval/test_demo_accuracy",
        "eval/test_demo_rationale_accuracy",
        "eval/test_demo_ece",
    }

    board = Board(tmp_path / "off", world, 0)
    board.scalars({"loss": 1.0}, 1)
    board.text("t", "t", 1)
    board.figures({}, 1)
    board.summary({}, {})
    board.close()
    assert not (tmp_path / "off").exists()


def test_the_settings_of_a_term_that_the_method_lacks_are_not_shown():
    defaults = to_flat(Config())
    for method, shown in (("dss", set()), ("ib", {"objective.beta", "objective.estimator"})):
        settings = to_flat(load_settings(None, {"objective.method": method}))
        assert set(hyperparameters(settings, defaults)) == {"objective.method", "run.seed"} | shown
    recipe = hyperparameters(to_flat(load_settings("demo", {})), defaults)
    assert list(recipe)[:2] == ["objective.method", "run.seed"] and recipe["optim.lr"] == 2e-3
    assert not {"objective.gamma", "run.dir", "run.eval_every"} & set(recipe)


def charted(group: str, chart: str, tags: Iterable[str]) -> set[str]:
    """The tags that a chart of the CUSTOM SCALARS tab shows."""
    _, patterns = reporters._LAYOUT[group][chart]
    return {tag for tag in tags if any(re.search(pattern, tag) for pattern in patterns)}


@pytest.mark.parametrize(
    ("term", "tag"), [("vid", "loss/vid"), ("vib", "loss/vib"), ("mi", "loss/mi"), ("mi_bound", "mi/bound")]
)
def test_every_estimator_is_in_the_chart_of_mutual_information(term, tag):
    tags = [log.tag(name) for name in ("ce_predict", "kd_explain", term)]
    assert charted("training", "mutual information", tags) == {tag}
    assert charted("training", "mutual information", ["mi/kl", "mi/constant_share"]) == {"mi/kl"}


def test_every_task_is_in_the_chart_of_faithfulness():
    """Text labels have no rule for what a rationale implies."""
    for task, label, rationale, implied in (
        ("jsonl", "no", "Whales breathe air.", set()),
        ("esnli", "neutral", "It is neutral.", {"faithful", "implies", "agreement"}),
    ):
        record = Record("0", task, "?", label, rationale, label)
        scores = faithfulness.faithfulness([label], [rationale], [record])
        tags = [f"eval/test_{task}_{name}" for name in report.curves(scores)]
        expected = {f"eval/test_{task}_{name}" for name in {"leakage"} | implied}
        assert charted("evaluation", "faithfulness", tags) == expected


def test_a_run_s_events_hold_every_group(make_job):
    overrides = {"run.eval_every": 6, "run.eval_limit": 9, "run.test_limit": 9, "objective.method": "ib"}
    made = make_job(**overrides, **{"run.term_gradients_every": 4})
    train.train(made)
    train.close(made)
    made.board.close()
    found = events(made.folder / "tensorboard")
    scalars = found.Tags()["scalars"]
    expected = """loss/total loss/predict loss/explain loss/mi mi/constant mi/constant_share mi/entropy
        grad/norm grad/clipped_share grad/share_mi grad/norm_predict optim/lr optim/skipped_steps speed/mfu
        speed/step_s speed/data_wait_s speed/student_s speed/tokens_per_s memory/peak_gib
        memory/model_states_gib data/epoch data/padded_share data/truncated_share_labels
        data/truncated_share_valid_questions data/truncated_share_test_labels
        eval/valid_demo_ece eval/test_demo_faithful accuracy/predict_tokens""".split()
    assert set(expected) <= set(scalars)
    assert [e.step for e in found.Scalars("loss/total")] == list(range(1, 13))
    assert [e.step for e in found.Scalars("grad/share_mi")] == [1, 5, 9]
    assert 0 < found.Scalars("speed/mfu")[-1].value < 1.5
    assert {"valid_demo/accuracy_by_length", "test_demo/reliability"} <= set(found.Tags()["images"])
    evaluated = [tag for tag in scalars if tag.startswith("eval/")]
    assert len(evaluated) <= 30 and not any("first_token" in tag for tag in evaluated)
    assert "first_token_ece" in made.results["test"]["demo"]
    text = found.Tensors("test_demo/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert made.records.test["demo"][0].question in text and "predicted label" in text


def test_without_tensorboard_nothing_is_written_or_measured(make_job):
    made = make_job(**{"run.report_to": [], "optim.max_steps": 2, "run.term_gradients_every": 1})
    train.train(made)
    assert not (made.folder / "tensorboard").exists() and not made.measures_gradients()


def test_a_terminal_gets_a_progress_bar_and_a_file_plain_lines(tmp_path):
    given = [TRAIN, *as_arguments(tiny(tmp_path / "run", **{"run.test_limit": 2}))]
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = start(given, log=Path(os.ttyname(terminal)))
    shown = b""
    while (ready := select.select([controller], [], [], 0.2)[0]) or process.poll() is None:
        shown += os.read(controller, 65536) if ready else b""
    os.close(terminal)
    os.close(controller)
    assert process.wait(60) == 0, shown[-3000:]
    text = shown.decode()
    assert re.search(r"12/12 \[\d\d:\d\d<\d\d:\d\d", text) and re.search(r"step 12/12 .* eta 0:00:00", text)
    again, log = as_arguments(tiny(tmp_path / "run2", **{"run.test_limit": 2})), tmp_path / "log"
    assert launch([TRAIN, *again], log=log) == 0
    plain = log.read_bytes()
    assert b"step 12/12" in plain and b"12/12 [" not in plain and b"\r" not in plain
