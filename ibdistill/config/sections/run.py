"""Settings of the run itself: its folder, and what it does at intervals and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ibdistill.config.fields import AtLeastOne, NotNegative, NotNegativeInt, Seed

ReporterName = Literal["tensorboard", "jsonl", "wandb"]


@dataclass(kw_only=True)
class RunConfig:
    """The run's folder and seed, and what it does at intervals and at its end."""

    dir: str = ""
    """Run folder: configuration, checkpoints, events, result. Empty: `runs/RECIPE`."""
    seed: Seed = 0
    """Seed of initialisation, data order and dropout."""
    log_every: AtLeastOne = 10
    """Steps between two console lines and TensorBoard points."""
    report_to: list[ReporterName] = field(default_factory=lambda: ["tensorboard", "jsonl"])
    """Where curves go. tensorboard: `DIR/tensorboard`; jsonl: `DIR/metrics.jsonl`; wandb: Weights & Biases,
    which takes its key, project and mode from its environment variables. `[]`: nowhere."""
    term_gradients_every: NotNegativeInt = 100
    """Steps between two measurements of the gradient norm of each term of the loss; 0: never."""
    peak_tflops: NotNegative = 0.0
    """Peak rate of one device in 10^12 operations per second, of which `speed/mfu` is a share. 0: its data
    sheet's, in the run's precision, for the GPUs that `runtime/hardware.py` lists; for other devices measured
    once, by matrix products."""
    eval_every: NotNegativeInt = 0
    """Steps between two evaluations on the validation split; 0: only at the end."""
    eval_limit: NotNegativeInt = 0
    """Evaluate on at most this many validation records during training; 0: all of them."""
    eval_batch_size: AtLeastOne = 64
    """Records that one rank decodes together, in evaluations and when it answers `data.unlabelled`."""
    save_every: AtLeastOne = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: AtLeastOne = 2
    """Checkpoints kept besides the best one."""
    keep_every: NotNegativeInt = 0
    """Keep the checkpoints of every so many steps too, a multiple of `save_every`; 0: no others."""
    local_dir: str = ""
    """A folder on each node's own disk, such as `$SLURM_TMPDIR`, for a `DIR` on a slow file system:
    checkpoints are written there first, and copied to `DIR` beside the steps. Empty: they go to `DIR`."""
    test_limit: NotNegativeInt = 0
    """Test on at most this many records of each task; 0: all of them."""
    final: Literal["last", "best"] = "last"
    """Which checkpoint is tested and exported: the last one, or the best of the evaluations on the validation
    split (see `eval_every`), as for small data sets, on which long training overfits."""
    patience: NotNegativeInt = 0
    """End the run after this many evaluations in a row (see `eval_every`) without a better score on the
    validation split; 0: never. The learning rate's schedule does not know of it."""
    export: bool = True
    """Write the student for `from_pretrained` to `DIR/student` at the end."""
    push_to_hub: str = ""
    """`NAME` or `OWNER/NAME`: the repository of the hub to which the exported student is then sent; it is
    made, private, if it is not there. The token comes from the environment (HF_TOKEN) or `hf auth login`."""
    max_skipped_steps: AtLeastOne = 5
    """End the run after this many steps in a row with a non-finite loss or gradient; fewer are skipped."""
    check_memory: bool = True
    """Refuse a run that cannot fit into memory before it loads anything: see `planning/memory_check.py`."""
    allow_config_change: bool = False
    """Resume although settings differ from those that the run folder was started with."""
