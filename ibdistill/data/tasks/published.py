"""Where records come from: data files in the layouts people have, the hub, the demo's generator.

A reader returns `{split: [Example]}`, always with `train`, and with `valid` and `test` where the
source has them. `tasks.load` turns examples into the records of a run. Recognised under
`data.path` (tried in this order, in a folder of the task's name below it, then in itself):

- the data release of "Distilling Step-by-Step!" (Hsieh et al., ACL 2023, arXiv 2305.02301):
  `NAME/NAME_{train,valid,test}.json`; what PaLM wrote in `NAME/llm/SPLIT_CoT_{0,1,...}.json`
  (lists of texts, one a record, in the records' order), GPT-NeoX's in `gpt-neox/NAME/SPLIT.json`;
- the original files: `SVAMP.json`; CoS-E's `cose_{train,dev}_v*.jsonl` with CommonsenseQA's
  `{train,dev}_rand_split.jsonl`; GSM8K's `{train,test}.jsonl`. LLM outputs beside them are read too.

Questions are written as that release writes them, so that figures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ibdistill.config.sections import DataConfig
from ibdistill.data import json_rows as formats
from ibdistill.data.json_rows import Row, field_text, read_rows
from ibdistill.data.records import Record

T = TypeVar("T")
_TEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Example:
    """A record as its source has it, not yet with an LLM's label or rationale."""

    record: Record
    where: str
    """`FILE:LINE` or the like, for messages."""
    llm: str | None = None
    """What the LLM wrote about this question; none where the source has no LLM outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set: its fields and the places that it is found in."""

    name: str
    fields: Callable[[dict[str, Any]], tuple[str, str, str]]
    """Row -> question, label, rationale. A KeyError or ValueError becomes a message with the row's place."""
    hub: tuple[str, str | None, str | None]
    """Arguments path, name and revision of `datasets.load_dataset`."""
    hub_splits: Mapping[str, str]
    """Our split -> the hub's."""
    original: Callable[[Path], dict[str, list[Row]] | None] | None = None
    """Reads the data set's own files in a folder; None where they are not there."""
    original_files: str = ""
    derive: Callable[[dict[str, Any]], str] | None = None
    """Row of the original files -> a rationale, for `data.derive_rationales`."""
    folders: tuple[str, ...] = ()
    """Other names that a folder of this data set may have under `data.path`."""


def read(source: Source, data: DataConfig, *, needs_rationale: bool) -> dict[str, list[Example]]:
    """The splits of a public data set, from `data.path` or else from the hub.

    Raises:
        ValueError: nothing recognisable at `data.path`, the hub cannot be reached, a bad line, or LLM
            outputs that are needed and missing or whose number differs from that of the records.
    """
    if data.path is None:
        return _examples(source.name, _fields(source, data, released=True), _hub_rows(source))
    path = Path(data.path)
    _check_exists(path)
    for root in [*(path / name for name in (source.name, *source.folders)), path]:
        rows, released = _release_rows(root, source.name), True
        if rows is None and source.original is not None:
            rows, released = source.original(root), False
        if rows is not None:
            break
    else:
        files = f"{source.name}_train.json" + (f" or {source.original_files}" if source.original else "")
        raise ValueError(
            f"data.path {data.path!r} holds no data of task {source.name!r}: looked for {files} in "
            f"{path / source.name} and {path}; name the folder that has them, or leave data.path empty "
            "to load from the hub"
        )
    splits = _examples(source.name, _fields(source, data, released), rows)
    # The release exists for its LLM rationales; to fall back on human ones would be another method.
    required = data.label_source == "llm" or (needs_rationale and (released or data.llm != "palm"))
    return {
        split: _with_llm_outputs(root, source.name, split, examples, data, required and split == "train")
        for split, examples in splits.items()
    }


def _fields(source: Source, data: DataConfig, released: bool) -> Callable[[dict[str, Any]], tuple]:
    """`source.fields`, with the derived rationale if that is asked for."""
    if not data.derive_rationales:
        return source.fields
    if source.derive is None or released:
        raise ValueError(
            f"data.derive_rationales reads the original SVAMP.json, and data.path is {data.path!r}: name the "
            "folder that has this file (and no files of the DSS release), or leave the setting out"
        )
    return lambda row: (*source.fields(row)[:2], source.derive(row))


def read_jsonl(data: DataConfig, *, needs_rationale: bool) -> dict[str, list[Example]]:
    """The user's own JSON lines: a folder with train, test and perhaps valid.jsonl, or one file.

    One file is split: a tenth of it is the test split, always the same. Records of a train.jsonl may
    lack a label where the teacher gives it.

    Raises:
        ValueError: no `data.path`, missing files, or a bad line.
    """
    if data.path is None:
        raise ValueError("data.path is not set: the task 'jsonl' needs a file, or a folder with train.jsonl")
    path = Path(data.path)
    _check_exists(path)
    files = {"train": path}
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in ("train", "valid", "test")}
        if not files["valid"].exists():
            del files["valid"]
        if missing := [file.name for file in files.values() if not file.exists()]:
            raise ValueError(
                f"data.path {data.path!r} lacks {' and '.join(missing)}: a folder for the task 'jsonl' has "
                "train.jsonl, test.jsonl and perhaps valid.jsonl; or name one file, which is then split"
            )

    def optional(row: dict[str, Any], key: str) -> str:
        return field_text(row, key) if row.get(key) is not None else ""

    unlabelled = data.label_source == "teacher" and path.is_dir()

    def fields(row: dict[str, Any]) -> tuple[str, str, str]:
        label = optional if unlabelled else field_text
        return (
            field_text(row, data.question_field),
            label(row, data.label_field),
            optional(row, data.rationale_field),
        )

    rows = {split: read_rows(file) for split, file in files.items()}
    return _examples("jsonl", fields, rows, unlabelled=("train",) if unlabelled else ())


def read_demo(task: str, data: DataConfig, *, needs_rationale: bool) -> dict[str, list[Example]]:
    """The demo's generated records, whose numbers are mapped already."""
    from ibdistill.data.tasks.demo import load_demo

    return {
        split: [Example(record, record.id) for record in records]
        for split, records in load_demo(task, data.demo_test_seed).items()
    }


def hold_out(items: list[T], share: float) -> tuple[list[T], list[T]]:
    """Splits off `share` of the items (rounded up), the same ones every time.

    They are those of `datasets.Dataset.train_test_split(seed=0)`, with which the DSS release
    splits off its validation records; both parts stay in the order of the items.
    """
    order = np.random.default_rng(0).permutation(len(items))
    held = int(np.ceil(share * len(items)))
    return [items[i] for i in sorted(order[held:])], [items[i] for i in sorted(order[:held])]


def _release_rows(root: Path, name: str) -> dict[str, list[Row]] | None:
    files = {split: root / f"{name}_{split}.json" for split in ("train", "valid", "test")}
    if not files["train"].is_file():
        return None
    if not files["test"].is_file():
        raise ValueError(f"{files['test']} is missing beside {files['train'].name}")
    return {split: read_rows(file) for split, file in files.items() if file.is_file()}


def _hub_rows(source: Source) -> dict[str, list[Row]]:
    import datasets

    path, name, revision = source.hub
    try:
        loaded = datasets.load_dataset(path, name, revision=revision)
    except Exception as error:  # the hub's client raises many unrelated types when it is offline
        raise ValueError(
            f"data.path is not set and {path} cannot be loaded from the hub "
            f"({type(error).__name__}: {error}); set data.path to a folder that holds the data of task "
            f"{source.name!r}"
        ) from error
    return {
        split: [(f"{path} {theirs}[{i}]", row) for i, row in enumerate(loaded[theirs])]
        for split, theirs in source.hub_splits.items()
    }


def _examples(
    name: str, fields: Callable, splits: dict[str, list[Row]], unlabelled: Collection[str] = ()
) -> dict[str, list[Example]]:
    """Rows to examples; splits a test split off where the source has none. Splits in `unlabelled` may lack
    labels."""
    examples: dict[str, list[Example]] = {}
    for split, rows in splits.items():
        if not rows:
            raise ValueError(f"the {split} split of task {name!r} is empty; give a file with records")
        examples[split] = [
            Example(_record(name, f"{name}/{split}/{i}", fields, row, where, split in unlabelled), where)
            for i, (where, row) in enumerate(rows)
        ]
    if "test" not in examples:
        examples["train"], examples["test"] = hold_out(examples["train"], _TEST_SHARE)
    return examples


def _record(task: str, id: str, fields: Callable, row: Any, where: str, unlabelled: bool) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    try:
        question, label, rationale = fields(row)
    except KeyError as error:
        raise ValueError(
            f"{where}: no {error.args[0]!r} for task {task!r}; the record has the fields {', '.join(row)}"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    for key, text in (("question", question), ("label", label)):
        if not text.strip() and not (unlabelled and key == "label"):
            raise ValueError(f"{where}: the {key} is empty; every record needs one")
    return Record(id, task, question, label.strip(), rationale.strip(), gold=label.strip())


def _with_llm_outputs(
    root: Path, name: str, split: str, examples: list[Example], data: DataConfig, required: bool
) -> list[Example]:
    """The examples with what the LLM wrote about each."""
    if data.llm == "palm":
        folder, pattern = root / "llm", f"{split}_CoT_*.json"
        found = list(folder.glob(pattern))
        files = [folder / f"{split}_CoT_{k}.json" for k in range(len(found))]
    else:
        folder, pattern = root.absolute().parent / data.llm / name, f"{split}.json"
        found = files = list(folder.glob(pattern))
    if not files:
        if required:
            raise ValueError(
                f"no outputs of data.llm {data.llm!r} for task {name!r}: looked for {folder / pattern}; "
                "set data.llm to one whose files you have, or train without them: "
                "--data.label_source gt --objective.method finetune"
            )
        return examples
    if missing := set(files) - set(found):
        raise ValueError(f"{sorted(missing)[0]} is missing although {folder} holds {len(found)} {pattern}")
    outputs = [row for file in files for row in read_rows(file)]
    if len(outputs) != len(examples):
        raise ValueError(
            f"{folder / pattern} holds {len(outputs)} LLM outputs, but the {split} split of {root} has "
            f"{len(examples)} records; they must be as many, in the same order"
        )
    for where, text in outputs:
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected the LLM's text, found {type(text).__name__}")
    return [
        Example(example.record, example.where, llm)
        for example, (_, llm) in zip(examples, outputs, strict=True)
    ]


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"data.path {str(path)!r} does not exist (seen from {Path.cwd()})")


SVAMP = Source(
    name="svamp",
    fields=formats.svamp_fields,
    hub=("ChilleD/SVAMP", None, None),
    hub_splits={"train": "train", "test": "test"},
    original=formats.svamp_files,
    original_files="SVAMP.json",
    derive=formats.derived_rationale,
)
ASDIV = Source(
    name="asdiv",
    fields=formats.asdiv_fields,
    hub=("EleutherAI/asdiv", None, "refs/convert/parquet"),
    hub_splits={"train": "validation"},  # its only split; a tenth of it becomes the test split
)
CQA = Source(
    name="cqa",
    fields=formats.cqa_fields,
    hub=("Salesforce/cos_e", "v1.11", None),
    hub_splits={"train": "train", "test": "validation"},  # CommonsenseQA's test labels are not public
    original=formats.cose_files,
    original_files="cose_train_v*.jsonl with train_rand_split.jsonl",
    folders=("cose", "cos_e"),
)
GSM8K = Source(
    name="gsm8k",
    fields=formats.gsm8k_fields,
    hub=("openai/gsm8k", "main", None),
    hub_splits={"train": "train", "test": "test"},
    original=formats.gsm8k_files,
    original_files="train.jsonl with test.jsonl",
)
ESNLI = Source(
    name="esnli",
    fields=formats.nli_fields,
    hub=(
        "esnli/esnli",
        None,
        "refs/convert/parquet",
    ),  # its main branch is a script, which `datasets` runs no more
    hub_splits={"train": "train", "valid": "validation", "test": "test"},
)
ANLI = tuple(
    Source(
        name=f"anli{n}",
        fields=formats.nli_fields,
        hub=("facebook/anli", None, None),
        hub_splits={"train": f"train_r{n}", "valid": f"dev_r{n}", "test": f"test_r{n}"},
    )
    for n in (1, 2, 3)
)
