"""Distil a chain-of-thought student:

    deepspeed --num_gpus 2 ibdistill/train.py RECIPE --section.field value ...

Parse, prepare, loop, close. The same command continues an interrupted run. Exit codes:
0 done, 2 bad input, 3 diverged, 85 saved after SIGUSR1 (start it again), 143 saved after
SIGTERM.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
import signal

# Kept pending until `StopRequest` can take it: the imports below last seconds, in which it would kill.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
# What they make stays to the end: to look for garbage among it costs an eighth of their time.
gc.disable()

import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from statistics import mean

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ibdistill.config import command_line, fields
from ibdistill.config.load import load_settings, recipes, to_yaml
from ibdistill.config.sections import Config
from ibdistill.data.records import Record
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.evaluation import report
from ibdistill.evaluation.predictions import Prediction
from ibdistill.models import export
from ibdistill.monitor import board, meter
from ibdistill.objectives.weights import means, step_weights, total
from ibdistill.runtime import distributed, files, hardware
from ibdistill.runtime.distributed import EXIT_DIVERGED
from ibdistill.training import pseudo_labels
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

gc.freeze()
gc.enable()

logger = logging.getLogger("ibdistill")


def main() -> None:
    """Run the recipe of the command line."""
    world = distributed.init()
    with distributed.user_errors():
        given = command_line.parse(sys.argv[1:])
        if given.help:
            if world.rank == 0:
                print(f"{__doc__}\nRecipes: {', '.join(recipes())}\n{fields.describe(Config)}")
            return
        job = prepare(load_settings(given.first, given.settings), world)
    if (job.folder / "result.json").is_file() and job.state.step >= job.config.optim.max_steps:
        logger.info("%s is finished already; its result is in result.json", job.folder)
    else:
        train(job)
        close(job)
    job.board.close()
    dist.destroy_process_group()


def train(job: Job) -> None:
    """Step until the last step or a signal. Everything but `train_step` happens once in a while."""
    run, state = job.config.run, job.state
    refreshes = pseudo_labels.due_steps(job.config)
    while state.step < job.config.optim.max_steps:
        start = time.perf_counter()
        if state.step in refreshes:
            refresh(job)
        train_step(job)
        state.seconds += time.perf_counter() - start

        last = state.step == job.config.optim.max_steps
        stop_code = job.stop.agreed()
        if state.skipped_in_row >= run.max_skipped_steps:
            give_up(job)
        evaluates = run.eval_every > 0 and (state.step % run.eval_every == 0 or last)
        saves = state.step % run.save_every == 0 or evaluates or last or stop_code
        if state.step % run.log_every == 0 or saves:
            log(job)
        if evaluates and not stop_code:
            score = mean(evaluate(job, "valid", run.eval_limit).values())
            if score > state.best_score:
                state.best_step, state.best_score = state.step, score
        if saves:
            if job.teacher_answers:
                job.teacher_answers.flush()
            saved = job.checkpoints.save(job.engine, state)
            if stop_code:
                leave(job, stop_code if saved else 1)


def train_step(job: Job) -> None:
    """One optimizer update on one global batch.

    Losses are sums weighted by the step's global counts (`objectives.step_weights`), so their
    gradients add up over ranks and micro-batches; DeepSpeed averages over ranks, hence the
    factor.
    """
    state, counts = job.state, job.sampler.counts(job.state.step)
    weights = step_weights(job.config.objective, counts)
    job.engine.module.head.measures = job.measures_gradients()
    start = time.perf_counter()
    micro_batches = job.micro_batches()
    data_seconds = time.perf_counter() - start

    for index, (rows, batch) in enumerate(micro_batches):
        batch = batch.to(job.world.device)
        answer = job.teacher_answers.of(rows, batch) if job.teacher_answers else None
        if job.teacher_answers and job.teacher_answers.overlaps and (following := job.following(index)):
            job.teacher_answers.start(*following)
        loss, terms = job.engine(batch, weights, answer, counts["question_tokens"])
        job.engine.backward(loss * job.world.size, scale_wrt_gas=False)
        job.engine.step()
        job.meter.add(batch, terms)

    job.meter.end_step(counts, data_seconds, norm=job.engine.get_global_grad_norm())
    state.step += 1
    if job.teacher_answers and state.step % job.sampler.steps_per_epoch == 0:
        job.teacher_answers.end_epoch()
    skipped = not job.engine.was_step_applied()
    state.skipped += skipped
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0


def answers(job: Job, model: PreTrainedModel, records: Sequence[Record]) -> list[Prediction]:
    """What the student says to records of one task. Collective; `model` is whole on every rank."""
    config = job.config
    return evaluation_predictions.evaluate(
        model, job.tokenizer, records, job.streams, config.data, job.world, config.run.eval_batch_size
    )


def refresh(job: Job) -> None:
    """Answer the unlabelled questions; the answers in use are learned from, from this step on. Collective."""
    config, start = job.config, time.perf_counter()
    with job.whole() as model:
        predictions = answers(job, model, job.unlabelled)
    pseudo = pseudo_labels.agreed(predictions)
    scalars = pseudo_labels.scalars(predictions, pseudo, time.perf_counter() - start)
    # at the first step that learns from them: a run that is resumed here purges it and writes it again
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


def log(job: Job) -> None:
    """Scalars to TensorBoard and one console line."""
    config, step = job.config, job.state.step
    dtype = torch.bfloat16 if config.student.precision == "bf16" else torch.float32
    peak = 1e12 * config.run.peak_tflops or hardware.measured_peak(job.world.device, dtype)
    interval = job.meter.close_interval()
    job.state.tokens += interval.tokens
    asked, right = (interval.terms.pop(f"teacher_{name}", 0.0) for name in ("asked", "right"))
    terms = means(interval.terms, interval.counts)
    scalars = {"loss/total": total(config.objective, terms)}
    scalars |= {meter.tag(name): value for name, value in terms.items()}
    if terms.get("mi"):
        scalars["mi/constant_share"] = meter.constant_share(terms["mi"], terms.get("mi_constant", 0.0))
    scalars |= interval.gradient_scalars(config.optim.clip_norm)
    if asked and config.data.label_source == "gt":
        scalars["teacher/accuracy"] = right / asked
    teacher = job.teacher_answers.timers() if job.teacher_answers else {}
    scalars |= interval.speed(job.world, teacher.get("stall", 0.0))
    scalars |= {f"speed/{name}_s": seconds / interval.steps for name, seconds in teacher.items()}
    operations = hardware.operations_per_token(job.engine.module.model)
    scalars["speed/mfu"] = interval.utilization(operations, peak, job.world)
    scalars["memory/peak_gib"] = (
        distributed.max_over_ranks(hardware.peak_memory(job.world.device)) / hardware.GIB
    )
    scalars["memory/model_states_gib"] = hardware.model_states(job.engine) / hardware.GIB
    scalars["optim/lr"] = job.engine.get_lr()[0]
    scalars["optim/skipped_steps"] = job.state.skipped
    scalars["data/epoch"] = step / job.sampler.steps_per_epoch
    job.board.scalars(scalars, step)
    losses = "  ".join(f"{tag.removeprefix('loss/')} {v:.4f}" for tag, v in scalars.items() if "loss/" in tag)
    logger.info(
        "step %d/%d  %s  grad %.3g  lr %.3g  %.0f tokens/s  %.2f s/step  eta %s",
        step,
        config.optim.max_steps,
        losses,
        scalars["grad/norm"],
        scalars["optim/lr"],
        scalars["speed/tokens_per_s"],
        scalars["speed/step_s"],
        timedelta(seconds=round(scalars["speed/step_s"] * (config.optim.max_steps - step))),
    )
    job.board.advance(step)
    if job.world.rank == 0:
        job.alarms.check(scalars, step)


def evaluate(job: Job, split: str, limit: int = 0) -> dict[str, float]:
    """Decode a split; task -> accuracy. Scores go to TensorBoard, predictions to a file. Collective."""
    scores: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    with job.whole() as model:
        for task, records in getattr(job.records, split).items():
            predictions = answers(job, model, records[: limit or None])
            scores[task] = distributed.run_on_rank_0(partial(show, job, f"{split}_{task}", predictions))
    seconds = time.perf_counter() - start
    job.meter.exclude(seconds)
    job.results |= {split: scores, f"{split}_seconds": round(seconds, 1)}
    return {task: values["accuracy"] for task, values in scores.items()}


def show(job: Job, name: str, predictions: Sequence[Prediction]) -> dict[str, float]:
    """Score one task's predictions; the scores, the predictions, figures and samples where people look."""
    step, folder = job.state.step, job.folder / "predictions"
    scores = evaluation_predictions.scores(predictions)
    evaluation_predictions.write_predictions(folder / f"step-{step:08d}" / f"{name}.jsonl", predictions)
    job.board.scalars({f"eval/{name}_{key}": value for key, value in scores.items()}, step)
    if job.config.run.tensorboard:
        figures = report.figures(predictions, f"{name}, step {step}")
        curve = report.learning_curve(folder, f"{name}.jsonl", step)
        figures |= {"accuracy_by_length": curve} if curve else {}
        job.board.figures({f"{name}/{key}": figure for key, figure in figures.items()}, step)
        job.board.text(f"{name}/samples", report.samples(predictions), step, markdown=True)
    brief = ("accuracy", "ece", "rationale_bleu", "rationale_rouge_l", "faithful")
    logger.info("%s  %s", name, "  ".join(f"{key} {scores[key]:.4g}" for key in brief if key in scores))
    return scores


def close(job: Job) -> None:
    """Test and export the final student, and write the result."""
    state, config = job.state, job.config
    if config.run.final == "best" and state.best_step not in (-1, state.step):
        job.checkpoints.restore(job.engine, state.best_step)
    evaluate(job, "test", config.run.test_limit)
    if config.run.export:
        with job.whole() as model:
            card = export.card(to_yaml(config), json.dumps(job.results.get("test"), indent=2))
            export.write(model, job.tokenizer, job.folder / "student", card)
    if job.world.rank == 0:
        result = {
            "method": config.objective.method,
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "ranks": job.world.size,
            "skipped_steps": state.skipped,
            "best_step": state.best_step if state.best_step >= 0 else None,
            **{split: scores for split, scores in job.results.items()},
        }
        files.write_json(job.folder / "result.json", result)
    final = {
        f"eval/{split}_{task}_{name}": value
        for split in ("valid", "test")
        for task, scores in job.results.get(split, {}).items()
        for name, value in scores.items()
    }
    flat, defaults = fields.to_flat(config), fields.to_flat(Config())
    job.board.hparams(board.hyperparameters(flat, defaults), final)
    logger.info("done: %s", job.folder / "result.json")


def give_up(job: Job) -> None:
    """Too many skipped steps in a row: name the questions of the last batch and end."""
    job.state.step -= 1
    ids = [
        i
        for part in distributed.gather_objects([b.question_ids for _, b in job.micro_batches()])
        for i in part
    ]
    logger.error(
        "%d steps in a row had a non-finite loss or gradient and were skipped. The last one's questions: %s. "
        "The last checkpoint in %s stands; try a smaller optim.lr, or student.precision fp32",
        job.state.skipped_in_row,
        ", ".join(q for batch in ids for q in batch),
        job.checkpoints.folder,
    )
    leave(job, EXIT_DIVERGED)


def leave(job: Job, code: int) -> None:
    """End with an exit code, all ranks together: a launcher kills the others when it sees one end."""
    if code != EXIT_DIVERGED:
        logger.warning("stopped by a signal after step %d, exit code %d", job.state.step, code)
    job.board.close()
    dist.barrier()
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        distributed.exit_at_once(end.code)
