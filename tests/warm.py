"""What scripts of the tests do first, done once in the process that they are forks of (harness.py).

Imports, the demo's corpus, the tables of transformers, the first fake tensors, the processor's rate. What
`conftest.py` leaves out in its own process is left out here too: most of the demo's validation and test
problems, and figures (see `harness.IN_FULL`).
"""

from __future__ import annotations

import gc
import importlib

import torch
from harness import short_code, short_demo
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ibdistill import evaluate_student, train  # noqa: F401
from ibdistill.config.load import load_settings
from ibdistill.data import stored_records
from ibdistill.data.tasks import demo
from ibdistill.evaluation import report
from ibdistill.planning import footprint
from ibdistill.runtime import deepspeed_fixes, hardware

for name in ("t5", "llama"):
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")
for name in ("peft", "matplotlib.figure", "sacrebleu", "torch.utils.tensorboard", "pandas"):
    importlib.import_module(name)
get_checkpoint_conversion_mapping("t5")
footprint.student_skeleton(
    load_settings(None, {"student.model": "demo-student", "student.precision": "fp32"})
)
deepspeed_fixes.import_muon_uncompiled()
hardware.peak_rate(torch.device("cpu"), torch.float32)  # each rank would measure it at its first logging step
demo.unlabelled(0)  # makes everything
_IN_FULL = demo.load_demo, report.figures, stored_records.code
demo.load_demo, report.figures = short_demo(demo.load_demo), lambda *_: {}
stored_records.code = short_code
gc.collect()
gc.freeze()  # no collection in a fork looks at all this again


def leave_nothing_out() -> None:
    """What a fork with `harness.IN_FULL` does first."""
    demo.load_demo, report.figures, stored_records.code = _IN_FULL
