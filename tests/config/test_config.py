"""Settings: precedence, types, ranges, and the messages of what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from ibdistill.config.fields import describe, from_flat, to_flat
from ibdistill.config.load import load_settings, recipes, to_yaml
from ibdistill.config.sections import Config


def test_precedence_is_defaults_then_recipe_then_overrides(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lr: 3e-4, max_steps: 7}\n")
    loaded = load_settings(str(recipe), {"optim.max_steps": 9})
    assert (loaded.optim.lr, loaded.optim.max_steps, loaded.optim.batch_size) == (3e-4, 9, 64)
    assert loaded.run.dir == "runs/mine"


def test_yaml_round_trip():
    written = load_settings(None, {"data.task": ["svamp", "cqa"], "student.dropout": 0.2, "run.dir": "x"})
    flat = {
        f"{s}.{k}": v for s, fields in yaml.safe_load(to_yaml(written)).items() for k, v in fields.items()
    }
    assert from_flat(Config, flat) == written
    assert to_flat(written) == flat


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("optim.lr", "3e-4", 3e-4),  # PyYAML leaves it a string
        ("optim.max_steps", 1e3, 1000),  # fire makes it a float
        ("optim.clip_norm", 1, 1.0),
        ("data.task", ("svamp", "cqa"), ["svamp", "cqa"]),
        ("data.path", "none", None),
        ("student.dropout", None, None),
        ("student.dropout", 0.5, 0.5),
        ("data.subsample", 300, 300.0),
        ("run.tensorboard", "false", False),
        ("run.tensorboard", "true", True),
    ],
)
def test_values_are_brought_to_their_type(name, given, value):
    section, key = name.split(".")
    found = getattr(getattr(load_settings(None, {name: given}), section), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "optim.lrr",
            1,
            r"unknown setting 'optim.lrr'. Did you mean optim.lr .*settings of optim: optim.lr,",
        ),
        ("optimiser", 1, r"unknown setting 'optimiser'.*sections: run, data, student"),
        ("optim.lr", True, r"optim.lr is True, a bool; it must be of type float"),
        ("optim.lr", "fast", r"optim.lr is 'fast', a str; it must be of type float"),
        ("optim.lr", float("inf"), r"optim.lr is inf"),
        ("optim.lr", 0, r"optim.lr is 0.0; it must be above 0"),
        ("optim.max_steps", 1.5, r"optim.max_steps is 1.5, a float; it must be of type int"),
        ("optim.batch_size", 0, r"optim.batch_size is 0; it must be at least 1"),
        ("objective.method", "dsss", r"must be one of finetune, dss, ib, kd, ib\+kd; did you mean 'dss'"),
        ("objective.method", True, r"objective.method is True; it must be one of"),
        ("run.dir", 2024, r"run.dir is 2024.*must be of type str; quote it twice"),
        ("run.export", 1, r"run.export is 1.*must be of type bool"),
        ("run.export", "yes", r"run.export is 'yes'.*must be of type bool"),
        ("data.subsample", 1.5, r"a share in \(0, 1\] or a whole number above 1"),
        ("data.task", 3, r"data.task is 3; it must be of type str or list of str"),
        ("student.dropout", 1.5, r"student.dropout is 1.5; it must be in \[0, 1\)"),
    ],
)
def test_what_is_refused_says_what_is_allowed(name, given, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, {name: given})


def test_warmup_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match=r"optim.warmup_steps is 9, more than optim.max_steps \(5\)"):
        load_settings(None, {"optim.warmup_steps": 9, "optim.max_steps": 5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: [", "is not valid YAML"),
        ("- 1", "must map sections to settings; it holds a list"),
        ("optim: 3", "'optim' must be a section with settings below it; it is 3"),
        ("optim: {learning_rate: 1}", "unknown setting 'optim.learning_rate'"),
        ("nonsense: {a: 1}", "unknown setting 'nonsense.a'"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_settings(str(path), {})


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ValueError, match=r"no recipe 'demoo'.*shipped: .*demo"):
        load_settings("demoo", {})


def test_every_shipped_recipe_loads_and_names_the_papers_settings():
    assert {"demo", "svamp", "cqa", "gsm8k", "esnli", "anli1"} <= set(recipes())
    for name in recipes():
        load_settings(name, {})
    for name in ("svamp", "cqa", "esnli", "anli1"):
        loaded = load_settings(name, {})
        optim, objective = loaded.optim, loaded.objective
        assert (optim.lr, optim.batch_size, optim.max_steps) == (5e-5, 64, 10_000)
        assert (objective.method, objective.alpha, objective.beta) == ("ib", 0.5, 0.1)


def test_help_lists_every_setting_with_its_meaning():
    text = describe(Config)
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            at = text.index(f"--{section.name}.{field.name}  (")
            meaning = text[at:].splitlines()[1].strip()
            assert len(meaning) > 8 and not meaning.startswith("--")
