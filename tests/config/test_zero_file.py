"""The DeepSpeed file: what it may say, and what it is told where it says more."""

from __future__ import annotations

import json

import pytest

from ibdistill.config import zero_file
from ibdistill.config.load import load_settings
from ibdistill.config.zero_file import DS_CONFIGS, read_ds_config


def written(tmp_path, content) -> str:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_shipped_files_are_read_as_they_are():
    assert {path.stem for path in DS_CONFIGS.glob("*.json")} >= {"zero0", "zero1", "zero2", "zero3"}
    for path in DS_CONFIGS.glob("*.json"):
        assert read_ds_config(path.stem) == read_ds_config(str(path)) == json.loads(path.read_text())


def test_the_stage_is_filled_in(tmp_path):
    for content in ({}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}):
        path = written(tmp_path, content)
        assert read_ds_config(path) == {"zero_optimization": {"stage": 0}}
        assert zero_file.zero_stage(load_settings(None, {"deepspeed.config": path})) == 0


@pytest.mark.parametrize(
    "content",
    [
        {"comms_logger": {"enabled": True}, "wall_clock_breakdown": True, "gradient_predivide_factor": 2},
        {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 5, "max_live_parameters": 7}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None, "overlap_comm": "auto"}},
    ],
)
def test_keys_of_deepspeed_that_no_setting_owns_are_allowed(tmp_path, content):
    found = read_ds_config(written(tmp_path, content))
    assert {key: found[key] for key in content} == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            r"mine.json: zero_optimisation is no key that DeepSpeed knows; did you mean 'zero_optim",
        ),
        ({"stage": 3}, r"mine.json: 'stage' stands on the first level; put it inside 'zero_optimization'"),
        ({"stage3_prefetch_bucket_size": 5}, r"put it inside 'zero_optimization'"),
        # as TRL and ms-swift write it, to which DeepSpeed does not listen
        ({"zero_optimization.stage": 3}, r"zero_optimization.stage is no key that DeepSpeed knows"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device is 'nvme' without nvme_path; give the folder of the disk, or",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": ""}}},
            "offload_optimizer.device is 'nvme' without nvme_path",
        ),
        ({"train_batch_sise": 3}, r"did you mean 'train_batch_size'"),
        ({"\x1b[31m": 3}, r"mine.json: \\x1b\[31m is no key that DeepSpeed knows"),
        (
            {"train_batch_size": 3},
            r"mine.json sets 'train_batch_size'; that belongs to optim.batch_size. Remove",
        ),
        ({"steps_per_print": 3}, r"'steps_per_print'; that belongs to run.log_every"),
        (
            {"wall_clock_breakdown": "yes"},
            r"mine.json: wall_clock_breakdown is 'yes'; it must be true or false",
        ),
        ({"comms_logger": True}, r"comms_logger is True; it must be an object"),
        ({"gradient_predivide_factor": True}, r"gradient_predivide_factor is True; it must be a number"),
        ({"zero_optimization": 3}, r"zero_optimization is 3; it must be an object"),
        (
            {"zero_optimization": {"stage": 4}},
            r"mine.json: zero_optimization.stage is 4; it must be 0, 1, 2 or 3",
        ),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization.stage is True; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, r"zero_optimization.stage is '3'; it must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"reduce_bucket": 5}},
            r"zero_optimization.reduce_bucket is no key .* did you mean 'reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            r"zero_optimization.offload_param.devise is no key that DeepSpeed knows; did you mean 'device'",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            r"zero_optimization.reduce_bucket_size is 'big': ",
        ),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, r"reduce_bucket_size is -1: .*greater than"),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            r"offload_param.device is 'gpu': .*'cpu'",
        ),
        ([], r"mine.json holds \[\]; it must be an object"),
        ("{", r"mine.json: not valid JSON: .*line 1"),
        (
            '{"zero_optimization": {"stage": 3}, "zero_optimization": {}}',
            r"mine.json: not valid JSON: the key 'zero_optimization' is given twice",
        ),
        ('{"zero_optimization": {"stage": 3, "stage": 0}}', r"the key 'stage' is given twice"),
        ("[" * 100_000, r"mine.json: not valid JSON"),
    ],
)
def test_what_is_refused_names_the_file_and_the_key(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_ds_config(written(tmp_path, content))


@pytest.mark.parametrize("name", ["zero9", "z" * 300, "z" * 300 + ".json", "\x1b[31m.json"])
def test_a_missing_file_lists_the_shipped_ones(name):
    with pytest.raises(
        ValueError, match=r"deepspeed.config is .*cannot be read \(.*\); shipped: zero0, "
    ) as error:
        read_ds_config(name)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def test_every_key_that_deepspeed_reads_is_known():
    """A dictionary that notes what DeepSpeed asks it for, against our own list."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = set()

    class Noting(dict):
        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

    DeepSpeedConfig(Noting(train_micro_batch_size_per_gpu=1))
    # read only where a process group is up; it divides the ranks, so it is refused like an unknown key
    asked.discard("sequence_parallel_size")
    assert len(asked) > 40 and asked <= zero_file._OTHER.keys() | zero_file._OWNED.keys()
    assert "sequence_parallel_size" not in zero_file._OTHER
