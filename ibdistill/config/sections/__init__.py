"""Every setting of a run: its type, default, range and meaning.

A setting's value comes, in rising precedence, from the defaults below, from a recipe (a YAML
file that lists only what differs), and from `--section.field value` on the command line. All
values are checked before a model or a data set is touched: one by one by `config/fields.py`,
against each other by `config/consistency.py`. The strings below the fields are what `--help`
prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ibdistill.config.sections.data import DataConfig
from ibdistill.config.sections.learning import DeepSpeedConfig, ObjectiveConfig, OnPolicyConfig, OptimConfig
from ibdistill.config.sections.models import StudentConfig, TeacherConfig
from ibdistill.config.sections.run import RunConfig


@dataclass(kw_only=True)
class Config:
    """All sections of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def rationale_folder(self) -> Path:
        """The folder of the teacher's texts. Raises ValueError if the teacher writes none."""
        if self.teacher.rationales == "none":
            raise ValueError("teacher.rationales is 'none'; set it to missing or all")
        return Path(self.teacher.rationale_cache or Path(self.run.dir) / "rationales")
