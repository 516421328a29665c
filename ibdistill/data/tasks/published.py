"""Where a public data set is found: the release of "Distilling Step-by-Step!", its own files, the hub.

Recognised under `data.path` (tried in this order, in a folder of the task's name below it, then in
itself):

- the data release of "Distilling Step-by-Step!" (DSS; Hsieh et al., ACL 2023, arXiv 2305.02301):
  `NAME/NAME_{train,valid,test}.json`; what PaLM wrote in `NAME/llm/SPLIT_CoT_{0,1,...}.json`
  (lists of texts, one per record, in the records' order), GPT-NeoX's in `gpt-neox/NAME/SPLIT.json`;
- the files that the data set's authors published, where the task can read them (`Published.original`).
  LLM outputs beside them are read too.

Without `data.path` the data set is loaded from the hub. Questions are written as the DSS release writes
them, so that figures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ibdistill.config.sections import DataConfig
from ibdistill.data.json_rows import Row, read_rows, rows_of
from ibdistill.data.lazy import Mapped
from ibdistill.data.tasks.base import Example, Fields, check_exists, examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The layout of one public data set; `read` is its task's reader."""

    fields: Fields
    """The fields of a row, in the release, in the original files and on the hub."""
    hub: tuple[str, str | None, str | None]
    """Arguments path, name and revision of `datasets.load_dataset`."""
    hub_splits: Mapping[str, str]
    """Our split -> the hub's."""
    original: Callable[[Path], dict[str, list[Row]] | None] | None = None
    """Reads the data set's own files in a folder; None where they are not there."""
    original_files: str = ""
    """The names of those files, for messages."""
    derive: Callable[[dict[str, Any]], str] | None = None
    """Row of the original files -> a rationale, for `data.derive_rationales`."""
    folders: tuple[str, ...] = ()
    """Other names that a folder of this data set may have under `data.path`."""

    def read(self, task: str, data: DataConfig, *, needs_rationale: bool) -> dict[str, Sequence[Example]]:
        """The splits of the data set, from `data.path` or else from the hub.

        Raises:
            ValueError: nothing recognisable at `data.path`, the hub cannot be reached, or LLM
                outputs that are needed and missing or whose number differs from that of the records.
        """
        if data.path is None:
            return examples(task, self._fields(data, released=True), self._hub_rows(task))
        path = Path(data.path)
        check_exists(path)
        for root in [*(path / name for name in (task, *self.folders)), path]:
            rows, released = _release_rows(root, task), True
            if rows is None and self.original is not None:
                rows, released = self.original(root), False
            if rows is not None:
                break
        else:
            files = f"{task}_train.json" + (f" or {self.original_files}" if self.original else "")
            raise ValueError(
                f"data.path {data.path!r} holds no data of task {task!r}: looked for {files} in "
                f"{path / task} and {path}; name the folder that has them, or leave data.path empty "
                "to load from the hub"
            )
        splits = examples(task, self._fields(data, released), rows)
        # The release exists for its LLM rationales; to fall back on human ones would be another method.
        required = data.label_source == "llm" or (needs_rationale and (released or data.llm != "palm"))
        return {
            split: _with_llm_outputs(root, task, split, part, data, required and split == "train")
            for split, part in splits.items()
        }

    def _fields(self, data: DataConfig, released: bool) -> Fields:
        """`fields`, with the derived rationale if that is asked for."""
        if not data.derive_rationales:
            return self.fields
        if self.derive is None or released:
            raise ValueError(
                f"data.derive_rationales reads the original {self.original_files}, and data.path is "
                f"{data.path!r}: name the folder that has this file (and no files of the DSS release), or "
                "leave the setting out"
            )
        return lambda row: (*self.fields(row)[:2], self.derive(row))

    def hub_state(self, task: str) -> list[str]:
        """What changes with the content of the copy from the hub. Raises ValueError as `read` does."""
        loaded = self._from_hub(task)
        return [loaded[theirs]._fingerprint for theirs in self.hub_splits.values()]

    def _hub_rows(self, task: str) -> dict[str, Sequence[Row]]:
        loaded = self._from_hub(task)
        return {split: self._rows(theirs, loaded[theirs]) for split, theirs in self.hub_splits.items()}

    def _rows(self, theirs: str, rows: Sequence[Any]) -> Sequence[Row]:
        return Mapped(lambda i: (f"{self.hub[0]} {theirs}[{i}]", rows[i]), range(len(rows)))

    def _from_hub(self, task: str) -> Mapping[str, Any]:
        import datasets

        datasets.disable_progress_bars()  # of preparing; those of downloads are the hub's, and stay

        path, name, revision = self.hub
        try:
            return datasets.load_dataset(path, name, revision=revision)
        except Exception as error:  # the hub's client raises many unrelated types when it is offline
            raise ValueError(
                f"data.path is not set and {path} cannot be loaded from the hub "
                f"({type(error).__name__}: {error}); set data.path to a folder that holds the data of task "
                f"{task!r}"
            ) from error


def _release_rows(root: Path, task: str) -> dict[str, Sequence[Row]] | None:
    files = {split: root / f"{task}_{split}.json" for split in ("train", "valid", "test")}
    if not files["train"].is_file():
        return None
    if not files["test"].is_file():
        raise ValueError(f"{files['test']} is missing beside {files['train'].name}")
    return {split: rows_of(file) for split, file in files.items() if file.is_file()}


def _with_llm_outputs(
    root: Path, task: str, split: str, part: Sequence[Example], data: DataConfig, required: bool
) -> Sequence[Example]:
    """The examples with what the LLM wrote about each."""
    if data.llm == "palm":
        folder, pattern = root / "llm", f"{split}_CoT_*.json"
        found = list(folder.glob(pattern))
        files = [folder / f"{split}_CoT_{k}.json" for k in range(len(found))]
    else:
        folder, pattern = root.absolute().parent / data.llm / task, f"{split}.json"
        found = files = list(folder.glob(pattern))
    if not files:
        if required:
            raise ValueError(
                f"no outputs of data.llm {data.llm!r} for task {task!r}: looked for {folder / pattern}; "
                "set data.llm to one whose files you have, or train without them: "
                "--data.label_source gt --objective.method finetune"
            )
        return part
    if missing := set(files) - set(found):
        raise ValueError(f"{sorted(missing)[0]} is missing although {folder} holds {len(found)} {pattern}")
    outputs = [row for file in files for row in read_rows(file)]
    if len(outputs) != len(part):
        raise ValueError(
            f"{folder / pattern} holds {len(outputs)} LLM outputs, but the {split} split of {root} has "
            f"{len(part)} records; they must be as many, in the same order"
        )
    for where, text in outputs:
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected the LLM's text, found {type(text).__name__}")
    return Mapped(lambda i: replace(part[i], llm=outputs[i][1]), range(len(part)))
