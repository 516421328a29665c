"""TRL's trainers on rows of token ids: what `train.py` and `real_model.py` run with `--trl PYTHON`.

TRL needs other versions of libraries than ibdistill pins, so nothing of ibdistill is imported here. The rows,
their order, the model's shape, precision and optimizer are those of `packed.py`; what TRL does besides by
default (the entropy and accuracy of each step) stays on. `trl` pads rows, `trl-packed` lets TRL pack them
(`packing=True`, best fit decreasing). Both are SFTTrainer; with a teacher, `trl` is GKDTrainer on the data's
text (`lmbda=0`). One JSON line on standard output says what was measured.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class Stopwatch(TrainerCallback):
    """Seconds of each step, its optimizer included, and its loss."""

    def __init__(self, cpu_time: bool) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._clock = time.process_time if cpu_time else time.perf_counter

    def on_step_begin(self, *_, **__) -> None:
        self._start = self._clock()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(self._clock() - self._start)

    def on_log(self, *_, logs: dict, **__) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def resident(key: str) -> int:
    """Bytes of an entry in this process's status file: VmRSS, or VmHWM, which is its high-water mark."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def load(case: dict, folder: str) -> PreTrainedModel:
    """The model of a folder in fp32, or a new one of the case's shape if there is no folder."""
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    config = AutoConfig.for_model(case["family"], **case["shape"])
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()


def trainer(case: dict, packed: bool, steps: int) -> tuple[SFTTrainer, Stopwatch]:
    """A trainer of this many steps; the rows come in their order."""
    torch.manual_seed(0)
    model = load(case, case["pretrained"])
    if case["pretrained"]:
        tokenizer = AutoTokenizer.from_pretrained(case["pretrained"], trust_remote_code=False)
    else:
        core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    columns = {"input_ids": [row for row, _ in case["rows"]]}
    if case["distils"]:  # GKDTrainer takes rows as they are, and looks for labels in them
        columns["labels"] = [[-100] * prompt + row[prompt:] for row, prompt in case["rows"]]
    else:
        columns["completion_mask"] = [
            [0] * prompt + [1] * (len(row) - prompt) for row, prompt in case["rows"]
        ]
    rows = Dataset.from_dict(columns)
    arguments = dict(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=1 if packed else case["batch_size"],
        max_length=case["tokens"] if packed else None,
        packing=packed,
        train_sampling_strategy="sequential",
        learning_rate=case["lr"],
        max_grad_norm=case["clip_norm"],
        optim="adamw_torch_fused",
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        lr_scheduler_type="constant",
        logging_steps=1,
        disable_tqdm=True,
    )
    watch = Stopwatch(case["cpu_time"])
    given = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [watch]}
    if not case["distils"]:
        return SFTTrainer(model, SFTConfig(**arguments), **given), watch
    given["teacher_model"] = load(case, case["teacher"])
    given["data_collator"] = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    return GKDTrainer(model, args=GKDConfig(lmbda=0.0, beta=0.5, **arguments), **given), watch


def main(file: str, variant: str) -> None:
    """Measure the case that a JSON file describes."""
    case, packed = json.loads(Path(file).read_text()), variant == "trl-packed"
    torch.set_num_threads(case["threads"])
    small = case | {"shape": case["tiny"], "pretrained": "", "teacher": ""}
    trainer(small, packed, 1)[0].train()  # libraries are warm, as where `packed.py` measures
    gc.collect()
    before = resident("VmRSS")
    made, watch = trainer(case, packed, case["steps"])
    batches = [batch for batch, _ in zip(made.get_train_dataloader(), range(case["steps"]), strict=False)]
    real = [
        int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches
    ]
    positions = [batch["input_ids"].numel() for batch in batches]
    Path("/proc/self/clear_refs").write_text("5")
    made.train()
    states = 16 * made.model.num_parameters()
    if case["distils"]:
        states += 4 * made.teacher_model.num_parameters()
    peak = resident("VmHWM") - before - states
    found = {"seconds": watch.seconds, "losses": watch.losses}
    found |= {"real": real, "positions": positions, "peak": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
