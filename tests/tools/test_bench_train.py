"""The training benchmark: its two losses are one, and it prints what it promises."""

from __future__ import annotations

import json
import re
import sys

import pytest
from harness import ROOT, output_of


def test_the_losses_agree_and_the_ratios_are_printed():
    options = "--preset demo-student --batch_size 2 --steps 8 --rounds 1 --memory False".split()
    printed = output_of(str(ROOT / "tools/bench/train.py"), *options)
    assert float(re.search(r"relative difference (\S+)", printed)[1]) < 1e-4
    ratios = dict(re.findall(r"^(\S+) / plain: (\S+) times the tokens/s$", printed, re.M))
    assert ratios.keys() == {"ours", "ours-bf16"} and all(float(ratio) > 0 for ratio in ratios.values())
    rows = dict(re.findall(r"^(\S+) +[\d.]+ +\d+ +([\d.]+)%", printed, re.M))
    assert rows.keys() == {"plain", "ours", "ours-bf16"}
    # the same questions, in buckets of similar lengths
    assert float(rows["ours"]) == float(rows["ours-bf16"]) < float(rows["plain"])


def bench(options: str) -> str:
    return output_of(str(ROOT / "tools/bench/train.py"), *options.split())


def test_packed_padded_plain_rows_and_trl_are_compared(tmp_path):
    """With a script in the place of TRL's interpreter, which says what `trl_trainers.py` would say."""
    fake = tmp_path / "python"
    told = '{"seconds": [0.5], "real": [300], "positions": [400], "peak": 1048576}'
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ cp "$2" {tmp_path}/case.json; echo \'{told}\'; }}\n')
    fake.chmod(0o755)
    printed = bench(f"--family qwen2 --batch_size 3 --steps 1 --rounds 1 --memory False --trl {fake}")
    assert float(re.search(r"relative difference (\S+)", printed)[1]) < 1e-4
    padding = dict(re.findall(r"^([\w-]+) +[\d.]+ +\d+ +([\d.]+)%", printed, re.M))
    assert padding.keys() == {"sft", "padded", "packed", "trl", "trl-packed"}
    assert float(padding["packed"]) == 0 < float(padding["padded"]) == float(padding["sft"])
    assert padding["trl"] == "25.0" and re.search(r"^trl +0.500 +600 +25.0% +1$", printed, re.M)
    assert len(re.findall(r"^[\w-]+ / [\w-]+: [\d.]+ times the tokens/s \(rounds ", printed, re.M)) == 10
    case = json.loads((tmp_path / "case.json").read_text())
    assert len(case["rows"]) == 3 and all(0 < prompt < len(row) for row, prompt in case["rows"])


def test_an_encoder_decoders_packed_rows_have_no_padding():
    printed = bench("--family t5 --batch_size 3 --steps 1 --rounds 1 --memory False")
    assert float(re.search(r"relative difference (\S+)", printed)[1]) < 1e-4
    padding = dict(re.findall(r"^(\w+) +[\d.]+ +\d+ +([\d.]+)%", printed, re.M))
    assert padding.keys() == {"padded", "packed"} and float(padding["packed"]) == 0 < float(padding["padded"])


@pytest.mark.parametrize(
    ("python", "family", "message"),
    [
        (sys.executable, "qwen2", "it cannot import trl .*No module named 'trl'.*pip install torch trl"),
        ("/nowhere/python", "qwen2", "it is no interpreter .No such file"),
        (sys.executable, "t5", "TRL's SFTTrainer takes no encoder-decoder model"),
    ],
)
def test_an_environment_without_trl_is_refused(python, family, message, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    import against_trl

    with pytest.raises(SystemExit, match=message):
        against_trl.check_trl(python, family)
