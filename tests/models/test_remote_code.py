"""A model folder's own code is never run, whatever stands on standard input."""

from __future__ import annotations

import json
import subprocess
import sys

import tiny_models
from harness import ROOT

LOAD = """
import sys
from ibdistill.data import tokenizers
from ibdistill.models import families
folder = sys.argv[1]
actions = [
    lambda: families.load_config(folder, "teacher.model"),
    lambda: tokenizers.load_tokenizer(folder, "teacher.model"),
    lambda: families.load_model(folder, tiny, setting="teacher.model"),
    lambda: families.identity(folder),
]
tiny = tokenizers.demo_tokenizer()
for action in actions:
    try:
        action()
    except ValueError as error:
        print("refused", str(error)[:300])
"""


def test_a_folders_code_does_not_run_even_where_yes_is_typed(tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tiny_models.save(folder, "llama")
    code = (
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    )
    (folder / "mine.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code + "def generate(*a, **k): pass\n")
    names = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]}
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text()) | {"auto_map": names}
        (folder / file).write_text(json.dumps(content))
    command = [sys.executable, "-c", LOAD, str(folder)]
    run = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert not ran.exists() and "Do you wish to run" not in run.stdout + run.stderr
