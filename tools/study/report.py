"""The report of a study: one JSON file of all runs, one markdown table, one figure.

A difference to the baseline is paired: the same seed means the same labelled records, the same pretrained
checkpoint and the same teacher. Its 95 % interval is Student's t over the seeds. Several seeds share a
variant of the pretrained models, so the interval covers the models' variance only as far as the few show it;
`variants` in the JSON has each variant's mean difference. In the figure an axis ends a little beyond the
single runs, and a wider interval is cut at its edge.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import compare_runs
from matplotlib.figure import Figure

from ibdistill.evaluation.plots import plain
from study import paired as tests

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from study.arms import Study

Scores = dict[int, float]
"""Seed -> accuracy, in percent."""


def write(study: Study, out: Path, results: dict[str, dict[str, Any] | None]) -> str:
    """Write study.json, table.md and study.png to `out` and return the table.

    Raises ValueError if no run is finished.
    """
    found = [(run, results[run.name]) for run in study.runs if results[run.name]]
    if not found:
        raise ValueError(f"{out} has no finished run of {study.path}; see {out / 'logs'}")
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run, result in found:
        groups[key(run)][run.seed] = result
    text = "\n".join([table(study, groups, results), *_unfinished(study, out, results), *_scores(groups)])
    content = {
        "study": study.path.name,
        "baseline": study.baseline,
        "runs": [_row(study, run, results[run.name]) for run in study.models + study.runs],
        "arms": {name: _summary(study, groups, name) for name in groups},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(content, indent=1))
    (out / "table.md").write_text(text + "\n")
    figure(study, groups).savefig(out / "study.png", dpi=100)
    return text


def key(run: Any) -> str:
    """The name of a run's group: `arm@labels`."""
    return f"{run.arm}@{run.labels:g}"


def accuracies(group: dict[int, dict[str, Any]]) -> Scores:
    """Test accuracy by seed, the mean over the tasks of a mixture."""
    return {
        seed: 100 * mean(scores["accuracy"] for scores in result["test"].values())
        for seed, result in sorted(group.items())
    }


def paired(a: Scores, b: Scores) -> tuple[float, float, int]:
    """(mean of a - b over the seeds of both, half its 95 % interval (NaN for one seed), number of seeds).

    Raises ValueError if they have no seed in common.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("no seed in common")
    return *compare_runs.interval([a[seed] - b[seed] for seed in seeds]), len(seeds)


def difference(a: Scores, b: Scores) -> str:
    """`+4.2 [+3.1, +5.3]`; no interval where there is nothing that it could be estimated from."""
    if not a.keys() & b.keys():
        return "-"
    center, half, seeds = paired(a, b)
    if math.isnan(half):
        return f"{center:+.1f}"
    if half < 1e-9:  # every seed differs by the same amount: an interval of width 0 would claim certainty
        return "identical" if abs(center) < 1e-9 else f"{center:+.1f} for each of {seeds} seeds"
    return f"{center:+.1f} [{center - half:+.1f}, {center + half:+.1f}]"


def table(study: Study, groups: dict[str, dict[int, dict]], results: dict[str, dict | None]) -> str:
    """The markdown table, the comparisons below it, and what one has to know about them."""
    head = f"arm|labels|steps|seeds|mean %|std|per seed|to {study.baseline}, 95 %|train s|CPU s"
    lines = [f"| {' | '.join(head.split('|'))} |", "|---" * len(head.split("|")) + "|"]
    missing = defaultdict(int)
    for run in study.runs:
        missing[key(run)] += results[run.name] is None
    for name in missing:
        arm, _, labels = name.rpartition("@")
        if name not in groups:
            lines.append(f"| {arm} | {labels} | not run |" + " |" * 7)
            continue
        group, scores = groups[name], accuracies(groups[name])
        base = f"{study.baseline}@{labels}"
        versus = "" if name == base or base not in groups else difference(scores, accuracies(groups[base]))
        cells = [arm, labels, str(next(iter(group.values()))["steps"]), str(len(scores))]
        cells += [f"{mean(scores.values()):.1f}", f"{stdev(scores.values()):.1f}" if len(scores) > 1 else ""]
        cells += [" ".join(f"{score:.1f}" for score in scores.values()), versus]
        cells += [_mean(group, "seconds"), _mean(group, "cpu_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""]
    lines += _compared(study, groups)
    lines += [f"- {name}: {note}" for name, note in study.notes.items() if note]
    done = [result for result in results.values() if result]
    commits, machines = (sorted({result[k] for result in done if k in result}) for k in ("commit", "machine"))
    lines.append(
        f"- {len(study.notes)} arms were tried; {len(done)} of {len(results)} runs are finished, those of "
        f"{len(study.models)} models included; commit {', '.join(commits) or 'unknown'}"
        + "".join(f"; {machine}" for machine in machines)
    )
    return "\n".join(lines)


def _compared(study: Study, groups: dict[str, dict[int, dict]]) -> list[str]:
    """A line for each comparison of the study that has runs, with Holm's p over all that it announces."""
    scores = {name: accuracies(group) for name, group in groups.items()}
    pairs = [(a, b) for a, b in study.comparisons if a in groups and b in groups]
    p: dict[tuple[str, str], float] = {}
    for a, b in pairs:
        if len(seeds := sorted(scores[a].keys() & scores[b].keys())) > 1:
            p[a, b] = tests.difference([scores[a][s] for s in seeds], [scores[b][s] for s in seeds]).p
    corrected = dict(zip(p, tests.holm(list(p.values()), len(study.comparisons)), strict=True))
    return [
        f"- {a} against {b}: {difference(scores[a], scores[b])}"
        + (f", p {corrected[a, b]:.2g} (Holm, {len(study.comparisons)})" if (a, b) in corrected else "")
        for a, b in pairs
    ]


def _unfinished(study: Study, out: Path, results: dict[str, dict | None]) -> list[str]:
    """A line for each run that was started and has no result: it failed, or was interrupted."""
    from study.command import first_error

    logs = {run.name: out / "logs" / f"{run.name}.log" for run in study.models + study.runs}
    return [
        f"- {name} was started and has no result: {first_error(log)}"
        for name, log in logs.items()
        if results[name] is None and log.is_file()
    ]


COLUMNS = {
    "strict %": ("accuracy_strict", 100),
    "lenient %": ("accuracy_lenient", 100),
    "ECE %": ("ece", 100),
    "AURC %": ("aurc", 100),
    "rationale implies the answer %": ("implies", 100),
    "right by the rationale %": ("rationale_accuracy", 100),
    "rationale chrF": ("rationale_chrf", 1),
    "tokens per answer": ("reason_tokens", 1),
    "unanswered %": ("reason_unanswered", 100),
}
"""Column -> the score of a run's evaluation, and the factor with which it is shown."""


def _scores(groups: dict[str, dict[int, dict]]) -> list[str]:
    """The second table: the other scores of each arm, means over seeds and tasks; empty where it has none."""
    rows = []
    for name, group in groups.items():
        found = [scores for result in group.values() for scores in result["test"].values()]
        cells = [
            f"{factor * mean(s[score] for s in found):.1f}" if all(score in s for s in found) else ""
            for score, factor in COLUMNS.values()
        ]
        rows.append(f"| {' | '.join([*name.rsplit('@', 1), *cells])} |")
    head = ["arm", "labels", *COLUMNS]
    lines = ["", "From the same runs, means over the seeds:", ""]
    return [*lines, f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]


def _mean(group: dict[int, dict[str, Any]], name: str) -> str:
    values = [result[name] for result in group.values() if name in result]
    return f"{mean(values):.0f}" if values else ""


def _row(study: Study, run: Any, result: dict[str, Any] | None) -> dict[str, Any]:
    def named(value: Any) -> Any:
        """With the names of the study's folders, which lie elsewhere on another machine."""
        for folder, name in study.folders.items():
            value = value.replace(folder, f"{{{name}}}") if isinstance(value, str) else value
        return value

    settings = {name: named(value) for name, value in run.settings.items()}
    own = {"name": run.name, "arm": run.arm, "labels": run.labels, "seed": run.seed, "recipe": run.recipe}
    return own | {"digest": run.name[-8:], "ranks": run.ranks, "settings": settings, "result": result}


def _summary(study: Study, groups: dict[str, dict[int, dict]], name: str) -> dict[str, Any]:
    scores = accuracies(groups[name])
    base = f"{study.baseline}@{name.rpartition('@')[2]}"
    summary: dict[str, Any] = {"mean": mean(scores.values()), "accuracy": scores}
    if base in groups and (seeds := scores.keys() & accuracies(groups[base]).keys()):
        center, half, n = paired(scores, accuracies(groups[base]))
        variants = defaultdict(list)
        for seed in seeds:
            variants[seed % study.variants].append(scores[seed] - accuracies(groups[base])[seed])
        summary["difference"] = {"mean": center, "half": None if math.isnan(half) else half, "seeds": n}
        summary["difference"]["variants"] = {v: mean(values) for v, values in sorted(variants.items())}
    return summary


def figure(study: Study, groups: dict[str, dict[int, dict]]) -> Figure:
    """The accuracy of each arm: with its interval, against compute, and against the number of labels.

    The last panel exists only where an arm has several numbers of labels. An arm has one look in all panels.
    """
    counts = [name.rpartition("@")[2] for name in groups]
    usual = max(set(counts), key=counts.count)
    arms = list(dict.fromkeys(name.rpartition("@")[0] for name in groups))
    looks = {arm: compare_runs.look(number) | {"linestyle": "-"} for number, arm in enumerate(arms)}
    at_usual = {arm: groups[f"{arm}@{usual}"] for arm in arms if f"{arm}@{usual}" in groups}
    curves = {arm: _by_labels(arm, groups) for arm in arms}
    curves = {arm: points for arm, points in curves.items() if len(points) > 1}
    widths = [1.5, 1, 1] if curves else [1.5, 1]
    figure = Figure(figsize=(4 * sum(widths), 1.6 + 0.28 * max(10, len(at_usual))), layout="constrained")
    ranked, compute, *rest = figure.subplots(1, len(widths), width_ratios=widths)
    amount = f"{usual} labels" if float(usual) > 1 else f"{float(usual):.0%} of the labels"  # else a share
    _draw_ranking(ranked, at_usual, looks, f"{amount}: mean, 95 % interval, seeds")
    _draw_compute(compute, at_usual, looks)
    if curves:
        _draw_labels(rest[0], curves, looks)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


def _by_labels(arm: str, groups: dict[str, dict[int, dict]]) -> list[tuple[float, Scores]]:
    """(number of labels, scores) of an arm, in rising order."""
    names = [name for name in groups if name.rpartition("@")[0] == arm]
    return sorted(
        ((float(name.rpartition("@")[2]), accuracies(groups[name])) for name in names), key=lambda p: p[0]
    )


def _draw_ranking(axes: Axes, arms: dict[str, dict[int, dict]], looks: dict[str, dict], title: str) -> None:
    values: list[float] = []
    for y, (arm, group) in enumerate(arms.items()):
        scores = list(accuracies(group).values())
        center, half = compare_runs.interval(scores)
        axes.errorbar(center, y, xerr=None if math.isnan(half) else half, capsize=3, **looks[arm])
        axes.plot(scores, [y] * len(scores), "|", color=looks[arm]["color"], alpha=0.6)
        values += scores
    axes.set_yticks(range(len(arms)), [*map(plain, arms)])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy %", title=title, xlim=compare_runs.limits(values))


def _draw_compute(axes: Axes, arms: dict[str, dict[int, dict]], looks: dict[str, dict]) -> None:
    results = [result for group in arms.values() for result in group.values()]
    clock = "cpu_seconds" if all("cpu_seconds" in result for result in results) else "seconds"
    for arm, group in arms.items():
        seconds = mean(result[clock] for result in group.values())
        axes.plot(seconds, mean(accuracies(group).values()), label=plain(arm), **looks[arm])
    words = clock.replace("_", " ").replace("cpu", "CPU")
    axes.set(xlabel=f"mean {words} of a run", ylabel="accuracy %", title="compute")
    axes.legend(fontsize=6, ncols=1 + len(arms) // 16)


def _draw_labels(axes: Axes, curves: dict[str, list[tuple[float, Scores]]], looks: dict[str, dict]) -> None:
    values: list[float] = []
    for arm, points in curves.items():
        intervals = [compare_runs.interval(list(scores.values())) for _, scores in points]
        y, half = zip(*intervals, strict=True)
        axes.errorbar([x for x, _ in points], y, yerr=half, capsize=3, label=plain(arm), **looks[arm])
        values += [score for _, scores in points for score in scores.values()]
    axes.set(xlabel="labelled questions, or their share", ylabel="accuracy %", title="labels needed")
    axes.set_ylim(compare_runs.limits(values))
    axes.legend(fontsize=7)
