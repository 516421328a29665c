"""Memory and time that the training data take on each rank, held in memory and in tables on the disk:

    deepspeed --num_gpus 4 tools/bench/data_tables.py RECORDS TOKENIZER FOLDER memory|tables

FOLDER gets the records, made up with a question of 16 words and a rationale of 20 to 40, and the tables. With
`memory` each rank reads and tokenizes all of them for itself, as ibdistill once did. The first run with
`tables` makes the tables, and the second finds them. Anonymous memory belongs to one rank; pages of files are
shared and can be dropped.
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
    records, tokenizer, folder, kind = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    world = distributed.init()
    path = Path(folder) / f"{records}.jsonl"
    distributed.run_on_rank_0(lambda: path.exists() or make(path, int(records)))
    settings = {"data.task": "jsonl", "data.path": str(path), "data.cache_dir": str(Path(folder) / "tables")}
    config = load_settings(None, settings)
    before, start = memory(), time.perf_counter()
    records, held = (in_memory if kind == "memory" else in_tables)(config, tokenizer, world)
    seconds, now = time.perf_counter() - start, memory()
    own = (seconds, now["RssAnon"] - before["RssAnon"], now["RssFile"], now["VmHWM"])
    found = distributed.gather_objects(own)
    if world.rank == 0:
        tokens = sum(table.lengths.sum() for table in (*held.questions.values(), *held.targets.values()))
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


def make(path: Path, records: int) -> None:
    """Write records of made-up sentences."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)
    words = (
        "Ann has some pens and gives a few of them away because her brother needs 12 or 15 at school".split()
    )
    with path.open("w") as file:
        for i in range(records):
            texts = [" ".join(drawn.choices(words, k=k)) for k in (16, drawn.randint(20, 40))]
            row = {"question": f"{i}: {texts[0]}?", "label": str(drawn.randint(0, 99)), "rationale": texts[1]}
            file.write(json.dumps(row) + "\n")


def memory() -> dict[str, float]:
    """Fields of /proc/self/status in MiB."""
    found = re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {name: int(size) / 1024 for name, size in found}


if __name__ == "__main__":
    main()
