"""Head loss and VID inside DeepSpeed engines: two real ranks, ZeRO 1 to 3, gradient accumulation."""

import json
from pathlib import Path

import pytest
from harness import launch

HEADS = ("t5-tied", "t5-untied", "gpt2-tied", "llama-untied")
RUNS = ("ZeRO-1, eager", "ZeRO-2, eager", "ZeRO-3, eager", "ZeRO-3, compiled")


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    worker, log = str(Path(__file__).parent / "zero_worker.py"), folder / "log"
    code = launch([worker, str(folder / "errors.json")], ranks=2, log=log, timeout=400)
    assert code == 0, log.read_text()[-4000:]
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_reference_in_one_process(errors, head, run):
    error, parameters = errors[f"{head}, {run}"]
    assert parameters > 10 and error < 1e-5
