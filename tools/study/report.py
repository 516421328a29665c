"""What a study says: one JSON of all runs, one markdown table, one figure.

A difference to the baseline is paired: the same seed means the same labelled records, the same
pretrained checkpoint and the same teacher. Its 95 % interval is Student's t over the seeds.
Models come in few variants that seeds share, so their variance is in the interval, though as of
few draws; `variants` in the JSON has each variant's mean difference.
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

if TYPE_CHECKING:
    from study.arms import Study

Scores = dict[int, float]
"""Seed -> accuracy, in percent."""


def write(study: Study, out: Path, results: dict[str, dict[str, Any] | None]) -> str:
    """Write study.json, table.md and study.png to `out`; the table. Raises ValueError if no run is done."""
    found = [(run, results[run.name]) for run in study.runs if results[run.name]]
    if not found:
        raise ValueError(f"{out} has no finished run of {study.path}; see {out / 'logs'}")
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run, result in found:
        groups[key(run)][run.seed] = result
    text = table(study, groups, results)
    content = {
        "study": study.path.name,
        "baseline": study.baseline,
        "runs": [_row(run, results[run.name]) for run in study.models + study.runs],
        "arms": {name: _summary(study, groups, name) for name in groups},
    }
    (out / "study.json").write_text(json.dumps(content, indent=1))
    (out / "table.md").write_text(text + "\n")
    figure(study, groups).savefig(out / "study.png", dpi=100)
    return text


def key(run: Any) -> str:
    """`arm@labels`."""
    return f"{run.arm}@{run.labels:g}"


def accuracies(group: dict[int, dict[str, Any]]) -> Scores:
    """Test accuracy by seed, the mean over the tasks of a mixture."""
    return {
        seed: 100 * mean(scores["accuracy"] for scores in result["test"].values())
        for seed, result in sorted(group.items())
    }


def paired(a: Scores, b: Scores) -> tuple[float, float, int]:
    """Mean of a - b over the seeds of both, half its 95 % interval (NaN for one seed), their number.

    Raises ValueError if they have no seed in common.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("no seed in common")
    return *compare_runs.interval([a[seed] - b[seed] for seed in seeds]), len(seeds)


def difference(a: Scores, b: Scores) -> str:
    """`+4.2 [+3.1, +5.3]`."""
    if not a.keys() & b.keys():
        return "-"
    center, half, _ = paired(a, b)
    return f"{center:+.1f}" + ("" if math.isnan(half) else f" [{center - half:+.1f}, {center + half:+.1f}]")


def table(study: Study, groups: dict[str, dict[int, dict]], results: dict[str, dict | None]) -> str:
    """The markdown table, the comparisons, and what one has to know about them."""
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
    for a, b in study.comparisons:
        if a in groups and b in groups:
            lines.append(f"- {a} against {b}: {difference(accuracies(groups[a]), accuracies(groups[b]))}")
    lines += [f"- {name}: {note}" for name, note in study.notes.items() if note]
    done = [result for result in results.values() if result]
    commits = sorted({result.get("commit", "") for result in done} - {""})
    lines.append(
        f"- {len(study.notes)} arms were tried; {len(done)} of {len(results)} runs are finished, those of "
        f"{len(study.models)} models included; commit {', '.join(commits) or 'unknown'}"
    )
    return "\n".join(lines)


def _mean(group: dict[int, dict[str, Any]], name: str) -> str:
    values = [result[name] for result in group.values() if name in result]
    return f"{mean(values):.0f}" if values else ""


def _row(run: Any, result: dict[str, Any] | None) -> dict[str, Any]:
    own = {"name": run.name, "arm": run.arm, "labels": run.labels, "seed": run.seed, "recipe": run.recipe}
    return own | {"digest": run.name[-8:], "ranks": run.ranks, "settings": run.settings, "result": result}


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
    """Accuracy of each arm with its interval; against labels; against seconds of training."""
    counts = [name.rpartition("@")[2] for name in groups]
    usual = max(set(counts), key=counts.count)
    arms = list(dict.fromkeys(name.rpartition("@")[0] for name in groups))
    rows = {arm: groups[f"{arm}@{usual}"] for arm in arms if f"{arm}@{usual}" in groups}
    figure = Figure(figsize=(14, 1.6 + 0.28 * max(10, len(rows))), layout="constrained")
    results = [result for group in groups.values() for result in group.values()]
    clock = "cpu_seconds" if all("cpu_seconds" in result for result in results) else "seconds"
    ranked, by_labels, by_seconds = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for y, (arm, group) in enumerate(rows.items()):
        scores = list(accuracies(group).values())
        center, half = compare_runs.interval(scores)
        color, marker = f"C{arms.index(arm) % 10}", "osD^v"[arms.index(arm) // 10 % 5]
        ranked.errorbar(
            center, y, xerr=None if math.isnan(half) else half, color=color, fmt=marker, capsize=3
        )
        ranked.plot(scores, [y] * len(scores), "|", color=color, alpha=0.5)
        seconds = mean(result[clock] for result in group.values())
        by_seconds.plot(seconds, center, marker, color=color, label=arm)
    ranked.set_yticks(range(len(rows)), rows)
    ranked.invert_yaxis()
    ranked.set(xlabel="accuracy %", title=f"{usual} labels: mean, 95 % interval, seeds")
    for arm in arms:
        points = sorted((float(n.rpartition("@")[2]), n) for n in groups if n.rpartition("@")[0] == arm)
        if len(points) > 1:
            intervals = [compare_runs.interval(list(accuracies(groups[n]).values())) for _, n in points]
            y, half = zip(*intervals, strict=True)
            color = f"C{arms.index(arm) % 10}"
            by_labels.errorbar(
                [x for x, _ in points], y, yerr=half, color=color, marker="o", capsize=3, label=arm
            )
    by_labels.set(xlabel="labelled questions", ylabel="accuracy %", title="labels needed")
    if by_labels.get_legend_handles_labels()[0]:
        by_labels.legend(fontsize=7)
    else:
        by_labels.set_axis_off()
    by_seconds.set(
        xlabel=f"mean {clock.replace('_', ' ').replace('cpu', 'CPU')} of a run",
        ylabel="accuracy %",
        title="compute",
    )
    by_seconds.legend(fontsize=6)
    for axes in (ranked, by_labels, by_seconds):
        axes.grid(alpha=0.3)
    return figure
