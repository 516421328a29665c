"""Distil a chain-of-thought student:

    deepspeed --num_gpus 2 ibdistill/train.py RECIPE --section.field value ...

The same command continues an interrupted run. `deepspeed --quiet` leaves the launcher's own lines out.
Exit codes: 0 done, 2 bad input or a run folder that another job works on, 3 diverged, 5 trained but
not all could be written (start it again once there is space), 6 the teacher's server is down (start
both again), 85 saved after SIGUSR1 (start it again), 143 saved after SIGTERM.
"""

# ruff: noqa: E402
from __future__ import annotations

from ibdistill.runtime import launcher, startup

startup.hold_requeue_signal()  # the imports below last seconds, in which the signal would kill
launcher.end_with_launcher()  # its thread must not take that signal, so it comes second
startup.pause_garbage_collection()

from ibdistill.config import fields
from ibdistill.config.load import load_settings, recipes
from ibdistill.config.sections import Config

if __name__ == "__main__":  # help needs none of the heavy imports
    startup.answer_help(lambda: f"{__doc__}\nRecipes: {', '.join(recipes())}\n{fields.describe(Config)}")

import logging
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean

import torch.distributed as dist

from ibdistill.config import command_line
from ibdistill.monitor import board
from ibdistill.monitor import log as monitor_log
from ibdistill.objectives.weights import step_weights
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import EXIT_DIVERGED, EXIT_UNREACHABLE, EXIT_UNWRITTEN
from ibdistill.runtime.folder_lock import FolderLock
from ibdistill.training import early_checks, on_policy, pseudo_labels, results, run_folder
from ibdistill.training.evaluation import answers, evaluate
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

startup.resume_garbage_collection()

logger = logging.getLogger("ibdistill")


def main() -> None:
    """Run the recipe of the command line."""
    world = distributed.init()
    with ExitStack() as at_the_end:
        with distributed.user_errors():
            given = command_line.parse(sys.argv[1:])
            config = load_settings(given.first, given.settings)
            distributed.run_on_rank_0(lambda: early_checks.check(config))
            lock = FolderLock(Path(config.run.dir))  # rank 0's process holds it
            at_the_end.callback(lock.release)
            distributed.run_on_rank_0(lock.acquire)
            job = prepare(config, world)
        if is_finished(job):
            logger.info("%s is finished already; its result is in %s", job.folder, run_folder.RESULT)
        else:
            train(job)
            close(job)
        job.board.close()
    dist.destroy_process_group()


def is_finished(job: Job) -> bool:
    """Whether all steps are taken and all of the end is written. Collective."""
    result = distributed.run_on_rank_0(lambda: run_folder.result(job.folder))
    return bool(result) and not result.get("unwritten") and is_over(job)


def is_over(job: Job) -> bool:
    """Whether all steps are taken, or the validation score has not risen for `run.patience` evaluations."""
    run, state = job.config.run, job.state
    return state.step >= job.config.optim.max_steps or 0 < run.patience <= state.stale_evaluations


def train(job: Job) -> None:
    """Step until the last step or a signal. Everything but `train_step` happens once in a while."""
    run, state = job.config.run, job.state
    refreshes = pseudo_labels.due_steps(job.config)
    while not is_over(job):
        start = time.perf_counter()
        if state.step in refreshes:
            refresh(job)
        if on_policy.is_due(job):
            sample_own_text(job)
        train_step(job)
        job.checkpoints.poll()
        state.seconds += time.perf_counter() - start

        last = state.step == job.config.optim.max_steps
        stop_code = job.stop.exit_code()
        if state.skipped_in_row >= run.max_skipped_steps:
            give_up(job)
        evaluates = run.eval_every > 0 and (state.step % run.eval_every == 0 or last)
        saves = state.step % run.save_every == 0 or evaluates or last or stop_code
        # a run that is killed while it samples the text of an epoch goes on with these weights
        saves = saves or (job.config.on_policy.every >= 1 and on_policy.is_due(job))
        if state.step % run.log_every == 0 or saves:
            log(job)
        if evaluates and not stop_code:
            score = mean(evaluate(job, "valid", run.eval_limit).values())
            state.stale_evaluations += 1
            if score > state.best_score:
                state.best_step, state.best_score, state.stale_evaluations = state.step, score, 0
            if is_over(job) and not last:
                last = True
                logger.info(
                    "step %d: no better validation score since step %d, so the run ends (run.patience)",
                    state.step,
                    state.best_step,
                )
        if saves:
            if job.teacher_answers:
                job.teacher_answers.flush()
            job.checkpoints.begin(job.engine, state, beside=not (last or stop_code))
            if stop_code:
                leave(job, stop_code if job.checkpoints.wait() else 1)
            if last and not job.checkpoints.wait() and job.world.rank == 0:
                job.unwritten.append(f"the checkpoint of step {state.step}")


def train_step(job: Job) -> None:
    """One optimizer update on one global batch.

    Losses are sums weighted by the step's global counts (`objectives.weights.step_weights`), so
    their gradients add up over ranks and micro-batches. DeepSpeed averages them over ranks, and
    the factor `world.size` undoes that.
    """
    state, counts = job.state, job.sampler.counts(job.state.step)
    weights = step_weights(job.config.objective, counts)
    job.engine.module.head.measures = job.measures_gradients()
    start = time.perf_counter()
    micro_batches = job.micro_batches()
    data_seconds = time.perf_counter() - start

    for index, (indices, batch) in enumerate(micro_batches):
        on_host, batch = batch, batch.to(job.world.device)
        answer = job.teacher_answers.of(indices, batch) if job.teacher_answers else None
        if job.teacher_answers and job.teacher_answers.overlaps and (following := job.following(index)):
            job.teacher_answers.start(*following)
        loss, terms = job.engine(batch, weights, answer, counts["question_tokens"])
        job.engine.backward(loss * job.world.size, scale_wrt_gas=False)
        job.engine.step()
        job.meter.add(on_host, terms)  # which counts tokens: on a GPU the host would wait for their number

    job.meter.end_step(counts, data_seconds, norm=job.engine.get_global_grad_norm())
    state.step += 1
    if job.teacher_answers and state.step % job.sampler.steps_per_epoch == 0:
        job.teacher_answers.end_epoch()
    skipped = not job.engine.was_step_applied()
    state.skipped += skipped
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0


def refresh(job: Job) -> None:
    """Answer the unlabelled questions, and learn from the answers in use from this step on. Collective."""
    config, start = job.config, time.perf_counter()
    job.checkpoints.wait()  # a run that is killed within this goes on from there
    with job.whole() as model:
        predictions = answers(job, model, job.unlabelled)
    pseudo = pseudo_labels.agreed(predictions)
    scalars = pseudo_labels.scalars(predictions, pseudo, time.perf_counter() - start)
    # shown at the first step that learns from them: a run that is resumed here purges and rewrites that step
    job.board.scalars(scalars, job.state.step + 1)
    brief = "  ".join(f"{tag.removeprefix('agree/')} {value:.4g}" for tag, value in scalars.items())
    logger.info("after step %d  unlabelled questions: %s", job.state.step, brief)
    if len(pseudo) < config.data.pseudo_batch_size(config.optim.batch_size):
        logger.warning("%d agreed answers do not fill their share of a batch: all of it is gold", len(pseudo))
        pseudo = []
    try:
        write = partial(pseudo_labels.write, job.folder, job.state.step, pseudo)
        job.state.pseudo = distributed.run_on_rank_0(write)
        job.mix(pseudo)
    except OSError as error:
        logger.error("agreed answers cannot be kept, so the earlier ones stay in force: %s", error)
    job.meter.exclude(time.perf_counter() - start)


def sample_own_text(job: Job) -> None:
    """Let the student write the text that it learns from in the coming steps. Collective."""
    start = time.perf_counter()
    if job.config.on_policy.every >= 1:
        job.checkpoints.wait()  # a run that is killed within this goes on from there
    try:
        scalars = on_policy.refresh(job)
    except (on_policy.Stopped, SystemExit) as stop:
        saved = job.checkpoints.save(job.engine, job.state)
        leave(job, stop.args[0] if saved else 1)
    except distributed.Unreachable as error:
        logger.error("%s", error)
        leave(job, EXIT_UNREACHABLE if job.checkpoints.save(job.engine, job.state) else 1)
    # shown at the first step that learns from it, as above
    job.board.scalars(scalars, job.state.step + 1)
    if job.world.rank == 0:
        job.alarms.check(scalars, job.state.step)
    brief = "  ".join(f"{tag.removeprefix('on_policy/')} {value:.4g}" for tag, value in scalars.items())
    if job.config.on_policy.every >= 1:
        logger.info("after step %d  on-policy text: %s", job.state.step, brief)
    job.meter.add_seconds("sampling", time.perf_counter() - start)


def log(job: Job) -> None:
    """Scalars to TensorBoard, one console line, and the alarms. Collective."""
    config, step = job.config, job.state.step
    peak_rate = monitor_log.peak_rate(config, job.world)
    interval = job.meter.close_interval()
    job.state.tokens += interval.tokens
    teacher_seconds = job.teacher_answers.timers() if job.teacher_answers else {}
    scalars = monitor_log.scalars(interval, config, job.world, job.engine, teacher_seconds, peak_rate)
    scalars["optim/skipped_steps"] = job.state.skipped
    scalars["data/epoch"] = step / job.sampler.steps_per_epoch
    job.board.scalars(scalars, step)
    logger.info(monitor_log.line(scalars, step, config.optim.max_steps))
    job.board.advance(step)
    if job.world.rank == 0:
        job.alarms.check(scalars, step)


def close(job: Job) -> None:
    """Test and export the final student, and write the result.

    What cannot be written costs nothing else: it is named at the end, in `result.json` too, and the exit code
    is EXIT_UNWRITTEN.
    """
    state, config = job.state, job.config
    if config.run.final == "best" and state.best_step not in (-1, state.step):
        with distributed.user_errors():
            job.checkpoints.restore(job.engine, state.best_step)
    evaluate(job, "test", config.run.test_limit)
    if config.run.export:
        results.export_student(job)
    if job.world.rank == 0:
        results.write_result(job)
    final = {
        f"eval/{split}_{task}_{name}": value
        for split in ("valid", "test")
        for task, scores in job.results.get(split, {}).items()
        for name, value in scores.items()
    }
    flat, defaults = fields.to_flat(config), fields.to_flat(Config())
    job.board.summary(board.hyperparameters(flat, defaults), final)
    unwritten = distributed.run_on_rank_0(lambda: job.unwritten)
    if unwritten:
        logger.error(
            "the run is trained and tested, but could not write: %s. All else stands; see to the space "
            "and the permissions, and start the same command again to write the rest",
            "; ".join(unwritten),
        )
        leave(job, EXIT_UNWRITTEN)
    logger.info("done: %s", job.folder / run_folder.RESULT)


def give_up(job: Job) -> None:
    """End after too many skipped steps in a row, with the questions of the last batch in the message."""
    job.state.step -= 1
    ranks = distributed.gather_objects([batch.question_ids for _, batch in job.micro_batches()])
    questions = [name for micro_batches in ranks for batch in micro_batches for name in batch]
    logger.error(
        "%d steps in a row had a non-finite loss or gradient and were skipped. The last one's questions: %s. "
        "The last checkpoint in %s stands; try a smaller optim.lr, or student.precision fp32",
        job.state.skipped_in_row,
        ", ".join(questions),
        job.checkpoints.folder,
    )
    leave(job, EXIT_DIVERGED)


def leave(job: Job, code: int) -> None:
    """End all ranks together with an exit code, since a launcher that sees one end kills the others."""
    if code not in (EXIT_DIVERGED, EXIT_UNREACHABLE, EXIT_UNWRITTEN):
        logger.warning("stopped by a signal after step %d, exit code %d", job.state.step, code)
    job.checkpoints.wait()
    job.board.close()
    dist.barrier()
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        distributed.exit_at_once(end.code)
