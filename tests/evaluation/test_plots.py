"""Figures: what they show is what they were given, and they draw in awkward cases."""

from __future__ import annotations

import io
import json
import logging
import re
import time

import numpy as np
import pytest

from ibdistill.config.sections import DataConfig
from ibdistill.data.loading import load
from ibdistill.data.records import Record
from ibdistill.evaluation import plots, predictions, report
from ibdistill.models import decoding


def drawn(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=40)
    return buffer.getvalue()


def test_the_wilson_interval_of_known_cases():
    """Against the textbook's 8 of 10: 0.490 to 0.943; and at the ends it stays within 0..1."""
    low, high = plots.wilson([8, 0, 10], [10, 10, 10])
    assert low == pytest.approx([0.490, 0.0, 0.722], abs=1e-3)
    assert high == pytest.approx([0.943, 0.278, 1.0], abs=1e-3)
    assert (low >= 0).all() and (high <= 1).all() and low[1] == 0 and high[2] == 1


def test_the_confusion_matrix_counts_every_answer():
    gold, predicted = ["a", "b", "b", "c"], ["a", "a", "b", "neither"]
    axes = plots.confusion(gold, predicted, "t").axes[0]
    counts = np.array([int(text.get_text()) for text in axes.texts]).reshape(3, 4)
    assert counts.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c", "(other)"]


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("right", [0, 1])
def test_figures_of_constant_answers_draw(n, right):
    correct = [right] * n
    for figure in (
        plots.reliability([0.0] * n, correct, "t"),
        plots.risk_coverage([1.0] * n, correct, "t"),
        plots.accuracy_by(list(range(n)), correct, "t", "steps"),
        plots.intervals({"accuracy": {"a": (0.5, float("nan")), "b": (0.5, 0.1)}}, "t"),
        plots.lines({"loss": [("a", [1], [2.0]), ("a", [1, 2], [2.0, 1.0])]}, "t"),
    ):
        assert drawn(figure).startswith(b"\x89PNG")


def predictions_of(records: list[Record], right: list[bool]) -> list[predictions.Prediction]:
    explained = [decoding.Answer(r.rationale, 1.0, 1.0) for r in records]
    return [
        predictions.prediction(r, decoding.Answer(r.gold if ok else "| `x`", 0.5, 0.5), rationale)
        for r, ok, rationale in zip(records, right, explained, strict=True)
    ]


HOSTILE = [
    "$\\frac{$",
    "5_{ or $ and $",
    "$5 and $3",
    "\\$5 and \\$3",
    "x" * 100_000,
    "$" * 100_000,
    "\ud83d",
    "a\nb\x1b[31m\x00",
    "_hidden",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_every_text_of_a_figure_is_drawn_as_it_is_and_cut(text):
    curves = {text: [(text, [1, 2], [1.0, 2.0])]}
    figures = [
        plots.reliability([0.5], [1], text),
        plots.risk_coverage([0.5], [1], text),
        plots.confusion([text, "b"], ["b", text + "x"], text),
        plots.accuracy_by([1, 2], [0, 1], text, text),
        plots.lines(curves, text, text),
        plots.intervals({text: {text: (0.5, 0.1)}}, text),
    ]
    start = time.process_time()
    for figure in figures:
        assert drawn(figure).startswith(b"\x89PNG")
    assert time.process_time() - start < 20
    shown = figures[2].axes[0].get_yticklabels()
    label = next(label for label in shown if label.get_text() != "b")
    expected = text if len(text) <= 40 else text[:39] + "…"
    expected = "".join(c if c.isprintable() else " " for c in expected)
    typeset, is_math = label._preprocess_math(label.get_text())
    assert not is_math and typeset.lstrip(" ") == expected.lstrip(" ")
    assert len(figures[4].axes[0].get_legend().get_texts()) == 1


def test_a_figure_that_fails_is_a_warning(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    made = predictions_of(load(DataConfig(), needs_rationale=True).valid["demo"][:4], [True] * 4)

    def typeset(*_):
        figure, axes = plots._axes("t", "x", "y")
        axes.set_title("$\\frac{$")  # raises only when it is drawn
        return figure

    monkeypatch.setattr(plots, "risk_coverage", typeset)
    monkeypatch.setattr(plots, "accuracy_by", lambda *_: 1 / 0)
    assert report.figures(made, "t").keys() == {"reliability", "first_token_reliability"}
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/p.jsonl").write_text("not JSON\n")
    assert report.learning_curve(tmp_path, "p.jsonl", last_step=2) is None
    # twice where another test has begun a run, which gives the logger a handler
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = list(dict.fromkeys(warnings))
    assert [line.split(" is left out: ")[0] for line in said] == [
        "the figure risk_coverage",
        "the figure accuracy_by_steps",
        "the figure accuracy_by_length",
    ]
    assert "ParseFatalException" in said[0] or "ValueError" in said[0]
    assert "ZeroDivisionError" in said[1] and "JSONDecodeError" in said[2]


@pytest.mark.parametrize(
    "text", [*HOSTILE, "", "a | b", "`x`", "<b>bold</b> [a](b) *c*", "ends in \\", "a\\|b"]
)
def test_samples_show_any_text_in_one_row_of_a_table(text):
    """They are rendered as TensorBoard does it, by Markdown with the extension for tables."""
    markdown = pytest.importorskip("markdown").markdown  # tensorboard's own
    record = Record("jsonl/test/0", "jsonl", text or "?", text, text, text)
    prediction = predictions.prediction(record, decoding.Answer(text, 0.5, 0.5), decoding.Answer(text, 1, 1))
    shown = report.samples([prediction])
    assert len(shown) < 5 * 2100 and shown.count("\n") == 9
    html = markdown(shown, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"])
    rows = re.findall(r"<tr>\n<td>(.*)</td>\n<td>(.*)</td>\n</tr>", html)
    assert [name for name, _ in rows] == [
        "question",
        "gold label",
        "predicted label",
        "gold rationale",
        "generated rationale",
    ]
    assert all(re.fullmatch(r"(<code>[^<]*</code>|\(empty\))", cell) for _, cell in rows), rows


def test_figures_samples_and_learning_curve_of_a_run(tmp_path):
    records = load(DataConfig(), needs_rationale=True).valid["demo"][:30]
    for step in (10, 20, 30):
        made = predictions_of(records, [i < step for i in range(30)])
        predictions.write_predictions(tmp_path / f"step-{step:08d}/valid_demo.jsonl", made)
    assert report.figures(made, "t").keys() == {
        "reliability",
        "first_token_reliability",
        "risk_coverage",
        "accuracy_by_steps",
    }
    shown = report.samples(predictions_of(records, [False] * 30), count=3)
    assert shown.count("**demo/valid/") == 3 and "demo/valid/20: wrong**" in shown and "\\| 'x'" in shown

    assert report.learning_curve(tmp_path, "valid_demo.jsonl", last_step=10) is None  # one point is no curve
    figure = report.learning_curve(tmp_path, "valid_demo.jsonl", last_step=20)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert lines.keys() == {"short rationales", "middle rationales", "long rationales"}
    words = [len(r.rationale.split()) for r in records]
    short = [i for i in range(30) if words[i] <= np.quantile(words, 1 / 3)]
    expected = [[10, np.mean([i < 10 for i in short])], [20, np.mean([i < 20 for i in short])]]
    assert lines["short rationales"].tolist() == pytest.approx(np.array(expected))
    # a resumed run writes its last evaluation anew
    predictions.write_predictions(
        tmp_path / "step-00000020/valid_demo.jsonl", predictions_of(records, [True] * 30)
    )
    figure = report.learning_curve(tmp_path, "valid_demo.jsonl", last_step=20)
    assert figure.axes[0].lines[0].get_ydata()[-1] == 1.0
    assert report.learning_curve(tmp_path, "test_demo.jsonl", last_step=20) is None


def test_without_rationales_there_is_no_learning_curve(tmp_path):
    row = {"gold_rationale": "", "correct": True}
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/p.jsonl").write_text(json.dumps(row) + "\n")
    assert report.learning_curve(tmp_path, "p.jsonl", last_step=2) is None
