"""What of a study is still to be run, checked before the first run starts."""

from __future__ import annotations

from pathlib import Path

from study.arms import ROOT, Run, Study, resolved, result


def of(study: Study, out: Path) -> list[Run]:
    """The runs without a result, after the models that they need and that are not in `out`.

    A model whose result is recorded elsewhere has no weights here, so it is trained if a run needs it.
    Raises ValueError for a run whose data do not exist.
    """
    todo = [run for run in study.runs if result(run, out) is None]
    for model in reversed(study.models):  # a model may need those before it
        is_here = (out / "runs" / model.name / "result.json").is_file()
        if not is_here and any(model.name in run.needs for run in todo):
            todo.insert(0, model)
    for run in todo:
        data = resolved(run, out).data.path  # a run starts in the project's root
        if data is not None and not (ROOT / data).exists() and out not in Path(data).parents:
            names = " or ".join(study.folders.values())
            way_out = f"; name its folder: --set {names}=FOLDER" if names else ""
            raise ValueError(
                f"{study.path}: data.path of {run.arm} is {data!r}, which does not exist{way_out}"
            )
    return todo
