"""The training benchmark: its two losses are one, and it prints what it promises."""

from __future__ import annotations

import re

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


def test_packed_padded_and_plain_rows_of_a_decoder_only_family_are_compared():
    options = "--family qwen2 --batch_size 3 --steps 1 --rounds 1 --memory False".split()
    printed = output_of(str(ROOT / "tools/bench/train.py"), *options)
    assert float(re.search(r"relative difference (\S+)", printed)[1]) < 1e-4
    padding = dict(re.findall(r"^(\w+) +[\d.]+ +\d+ +([\d.]+)%", printed, re.M))
    assert padding.keys() == {"sft", "padded", "packed"}
    assert float(padding["packed"]) == 0 < float(padding["padded"]) == float(padding["sft"])
    assert len(re.findall(r"^\w+ / \w+: [\d.]+ times the tokens/s$", printed, re.M)) == 3
