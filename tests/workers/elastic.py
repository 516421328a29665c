"""`python elastic.py FOLDER`: each run of CASES goes through STARTS, two steps each.

Run by test_elastic. FOLDER/CASE-NUMBER-saved.pt holds all weights and AdamW moments when start NUMBER saved,
and ...-found.pt what the next start began with, as DeepSpeed's own functions gather them; ...-bytes.pt what
each rank holds then and what its checkpoint has written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny_models
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from harness import steps, tiny
from workers import footprints, ranks

from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare

STARTS = ((2, "zero2"), (1, "zero3"), (3, "zero1"), (2, "zero0"), (3, "zero3_offload"), (1, "zero2_offload"))
"""(ranks, `deepspeed.config`) of one start after another."""
VID = {"objective.method": "ib", "teacher.placement": "replica", "teacher.model": "demo-teacher"}
CASES: dict[str, dict[str, object]] = {
    "bf16_vid": {"student.precision": "bf16"} | VID,
    "fp32_lora": {"student.lora_rank": 4, "optim.micro_batch_size": 2, "optim.weight_decay": 0.1},
}
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def states(engine) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter -> kind -> its whole values in fp32. Collective."""
    optimizer, stage, found = engine.optimizer, engine.zero_optimization_stage(), {}
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = {}
    if stage == 0 and inner is not optimizer:  # bf16
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= zip(narrow, wide, strict=True)
    if stage in (1, 2):  # where DeepSpeed's functions look is linked at the first step only
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage:
            values = [safe_get_full_fp32_param(parameter)]
            values += [safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:]]
        else:
            master = masters.get(parameter, parameter)
            values = [master, *(inner.state[master][kind] for kind in KINDS[1:])]
        found[name] = dict(zip(KINDS, (value.detach().clone() for value in values), strict=True))
    return found


def main(folder: Path, number: int, zero: str) -> None:
    world = distributed.init()

    def keep(engine, name: str) -> None:
        whole = states(engine)
        if world.rank == 0:
            torch.save(whole, folder / f"{name}.pt")

    def measure(job, name: str) -> None:
        held = distributed.gather_objects(footprints.states(job.engine))
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in job.engine.module.parameters()]
        if world.rank == 0:
            files = job.checkpoints.folder.glob(f"step-{job.state.step:08d}/*.pt")
            written = sum(path.stat().st_size for path in files)
            torch.save({"held": held, "sizes": sizes, "written": written}, folder / f"{name}-bytes.pt")

    for case, more in CASES.items():
        model = {"student.model": str(folder / "model")} if "lora" in case else {}
        settings = more | model | {"deepspeed.config": zero, "run.report_to": []}
        job = prepare(load_settings(None, tiny(folder / case, **settings)), world)
        assert job.state.step == 2 * number
        if number:
            keep(job.engine, f"{case}-{number - 1}-found")
        steps(job, 2)
        assert job.checkpoints.save(job.engine, job.state)
        keep(job.engine, f"{case}-{number}-saved")
        measure(job, f"{case}-{number}")
    distributed.gather_objects(None)


if __name__ == "__main__":
    to = Path(sys.argv[1])
    tiny_models.save(to / "model", "t5")
    for number, (count, zero) in enumerate(STARTS):
        ranks.run(main, to, number, zero, ranks=(count,))
