"""Memory and time that the training data take on each rank, held in memory and in tables on the disk:

    deepspeed --num_gpus 4 tools/bench/data_tables.py RECORDS WORDS TOKENIZER FOLDER KIND

FOLDER gets the records, made up with a question of 16 words and a rationale of about WORDS, and the tables.

    KIND     what each rank does
    memory   it reads and tokenizes all records for itself, as ibdistill once did
    tables   the first time the first rank makes the tables, then all find them
    records  the first rank makes the records' table alone

Anonymous memory belongs to one rank; pages of files are shared and can be dropped.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path

import torch.distributed as dist

from ibdistill.config.load import load_settings
from ibdistill.config.sections import Config
from ibdistill.data import loading
from ibdistill.data.features import Features
from ibdistill.data.text_checks import check_texts
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.data.tokenizing import tokenize
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import World
from ibdistill.training import tables


def main() -> None:
    """Read and tokenize the records, and print what each rank holds."""
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    number, words, tokenizer, folder, kind = int(given[0]), int(given[1]), *given[2:]
    world = distributed.init()
    path = Path(folder) / f"{number}-{words}.jsonl"
    distributed.run_on_rank_0(lambda: path.exists() or make(path, number, words))
    settings = {"data.task": "jsonl", "data.path": str(path), "data.cache_dir": str(Path(folder) / "tables")}
    config = load_settings(None, settings)
    before, start = memory(), time.perf_counter()
    records, held = KINDS[kind](config, tokenizer, world)
    seconds, now = time.perf_counter() - start, memory()
    own = (seconds, now["RssAnon"] - before["RssAnon"], now["RssFile"], now["VmHWM"])
    found = distributed.gather_objects(own)
    if world.rank == 0:
        tables_of = (*held.questions.values(), *held.targets.values()) if held else ()
        tokens = sum(table.lengths.sum() for table in tables_of)
        print(f"{kind}: {len(records.train)} training records, {tokens} tokens")
        for rank, (spent, anonymous, mapped, peak) in enumerate(found):
            print(
                f"rank {rank}: {spent:.1f} s, {anonymous:.0f} MiB anonymous memory more, {mapped:.0f} MiB "
                f"pages of files (libraries too), peak {peak:.0f} MiB"
            )
    dist.destroy_process_group()


def in_memory(config: Config, tokenizer: str, world: World) -> tuple[loading.Loaded, Features]:
    """What each rank held before there were tables."""
    records = loading.load(config.data, needs_rationale=True)
    prefixes = {name: loading.TASKS[name].prefixes for name in records.test}
    loaded = load_tokenizer(tokenizer, "TOKENIZER")
    features = tokenize(records.train, prefixes, loaded, config.data)
    check_texts(records, features, loaded, config.data)
    return records, features


def in_tables(config: Config, tokenizer: str, world: World) -> tuple[loading.Loaded, Features]:
    """What each rank holds now."""
    records = tables.load(config.data, world, needs_rationale=True)
    return tables.tokenize(config, records, load_tokenizer(tokenizer, "TOKENIZER"), world)[:2]


def records_alone(config: Config, tokenizer: str, world: World) -> tuple[loading.Loaded, None]:
    """The records' table as runs make it."""
    return tables.load(config.data, world, needs_rationale=True), None


KINDS = {"memory": in_memory, "tables": in_tables, "records": records_alone}


def make(path: Path, records: int, about: int) -> None:
    """Write records of made-up sentences."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)
    words = (
        "Ann has some pens and gives a few of them away because her brother needs 12 or 15 at school".split()
    )
    with path.open("w") as file:
        for i in range(records):
            lengths = 16, drawn.randint(about * 2 // 3, about * 4 // 3)
            texts = [" ".join(drawn.choices(words, k=k)) for k in lengths]
            row = {"question": f"{i}: {texts[0]}?", "label": str(drawn.randint(0, 99)), "rationale": texts[1]}
            file.write(json.dumps(row) + "\n")


def memory() -> dict[str, float]:
    """Fields of /proc/self/status in MiB."""
    found = re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {name: int(size) / 1024 for name, size in found}


if __name__ == "__main__":
    main()
