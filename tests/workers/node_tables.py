"""Tables on two nodes: `FOLDER/I.json` gets what went wrong on each rank, empty if nothing.

Both ranks act as the first of a node. They read the same data (I = 0), other data (1), none on one (2), and
other test records (3).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import ranks

from ibdistill.config.load import load_settings
from ibdistill.data import tokenizers
from ibdistill.runtime import distributed
from ibdistill.training import tables


def main(folder: Path) -> None:
    world = dataclasses.replace(distributed.init(), local_rank=0)
    for case, hosts in enumerate((("0", "1"), ("0", "2"), ("0", "3"), ("0", "4"))):
        own = folder / hosts[world.rank]
        settings = {"data.task": "jsonl", "data.path": str(own / "data.jsonl")}
        config = load_settings(None, settings | {"data.cache_dir": str(own / "cache")})
        error = ""
        try:
            records = tables.load(config.data, world, needs_rationale=True)
            tables.tokenize(config, records, tokenizers.demo_tokenizer(), world)
        except ValueError as caught:
            error = str(caught)
        found = distributed.gather_objects(error)
        if world.rank == 0:
            (folder / f"{case}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[1]), ranks=[2])
