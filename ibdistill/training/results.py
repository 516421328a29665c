"""What a finished run leaves behind: the exported student and `result.json`."""

from __future__ import annotations

import logging

from ibdistill.models import export, hub
from ibdistill.runtime import files
from ibdistill.runtime.version import version
from ibdistill.training import run_folder
from ibdistill.training.job import Job

logger = logging.getLogger("ibdistill")


def export_student(job: Job) -> None:
    """Write the student for `from_pretrained`, on rank 0. Collective."""
    target = job.folder / "student"
    with job.whole() as model:
        if job.world.rank != 0:
            return
        try:
            with files.folder_replaced(target) as folder:
                export.write(model, job.tokenizer, folder, job.config, job.results.get("test"))
            usage = export.lines(model, job.tokenizer, job.config, target)
            logger.info("the student answers with\n\n%s\n", usage)
            if job.config.run.push_to_hub:
                logger.info("the student is at %s", hub.push(target, job.config.run.push_to_hub))
        except Exception as error:  # the libraries that write have errors of their own for a full disk
            job.unwritten.append(f"{target} ({type(error).__name__}: {error})")


def write_result(job: Job) -> None:
    """Write `result.json`, on rank 0. Scores that an earlier start of the same run has left there stay."""
    config, state, path = job.config, job.state, job.folder / run_folder.RESULT
    before = run_folder.result(job.folder)
    earlier = before if before.get("steps") == state.step else {}
    result = {
        "method": config.objective.method,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "ranks": job.world.size,
        "precision": config.student.precision,
        **version(),
        "skipped_steps": state.skipped,
        "best_step": state.best_step if state.best_step >= 0 else None,
        **{split: earlier[split] for split in ("valid", "valid_seconds") if split in earlier},
        **job.results,
    }
    if state.sampled:
        result["on_policy"] = {"texts": state.sampled, "unfinished": state.unfinished}
    if job.unwritten:
        result["unwritten"] = job.unwritten
    try:
        files.write_json(path, result)
    except OSError as error:
        job.unwritten.append(f"{path} ({error})")
