"""Settings: precedence, types, ranges, and the messages of what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from ibdistill.config.fields import describe, from_flat, to_flat
from ibdistill.config.load import load_settings, recipes, to_yaml
from ibdistill.config.sections import Config


def test_precedence_is_defaults_then_recipe_then_overrides(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lr: 3e-4, max_steps: 7}\n")
    loaded = load_settings(str(recipe), {"optim.max_steps": 9})
    assert (loaded.optim.lr, loaded.optim.max_steps, loaded.optim.batch_size) == (3e-4, 9, 64)
    assert loaded.run.dir == "runs/mine"


@pytest.mark.parametrize(
    "folder", ["x", "run#1", "(v2)", "10", "1e3", "yes", "null", "a: b", "'q'", "~", "ä b"]
)
def test_yaml_round_trip(tmp_path, folder):
    written = load_settings(None, {"data.task": ["svamp", "cqa"], "student.dropout": 0.2, "run.dir": folder})
    assert written.run.dir == folder
    assert from_flat(Config, to_flat(written)) == written
    (tmp_path / "written.yaml").write_text(to_yaml(written))
    assert load_settings(str(tmp_path / "written.yaml"), {}) == written


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", ".5", 0.5),
        ("optim.lr", "1", 1.0),
        ("optim.max_steps", 1e3, 1000),
        ("optim.max_steps", "1e3", 1000),
        ("optim.max_steps", "10_000", 10_000),
        ("optim.max_steps", "9007199254740993", 9007199254740993),  # 2**53 + 1, which no float is
        ("optim.max_steps", "010", 10),
        ("optim.clip_norm", 1, 1.0),
        ("data.task", ("svamp", "cqa"), ["svamp", "cqa"]),
        ("data.task", "svamp,cqa", ["svamp", "cqa"]),
        ("data.task", "svamp, cqa", ["svamp", "cqa"]),
        ("data.task", "[svamp, cqa]", ["svamp", "cqa"]),
        ("data.task", '["svamp","cqa"]', ["svamp", "cqa"]),
        ("data.task", "['svamp', 'cqa']", ["svamp", "cqa"]),
        ("data.task", "[svamp]", ["svamp"]),
        ("data.task", "10", "10"),
        ("data.agree_at", "0.25,0.5", [0.25, 0.5]),
        ("data.agree_at", "0.25", [0.25]),
        ("student.lora_targets", "[]", []),
        ("student.lora_targets", "q_proj", ["q_proj"]),
        ("data.mixture_weights", "none", None),
        ("data.mixture_weights", "[1, 2e-1]", [1.0, 0.2]),
        ("data.path", "none", None),
        ("data.path", "None", None),
        ("data.path", "a,b", "a,b"),  # a path is no list
        ("data.unlabelled", "2000", 2000),
        ("data.unlabelled", "2000.jsonl", "2000.jsonl"),
        ("teacher.rationales", "none", "none"),  # a choice, not the absence of one
        ("teacher.cache", "10", "10"),
        ("teacher.template", "answer: {question}, 'please' # now", "answer: {question}, 'please' # now"),
        ("student.dropout", None, None),
        ("student.dropout", 0.5, 0.5),
        ("data.subsample", 300, 300.0),
        ("run.export", "false", False),
        ("run.export", "true", True),
        ("run.export", "False", False),
        ("run.export", True, True),
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
        ("optim.lr", True, r"optim.lr is True, or without a value; it must be of type float"),
        ("optim.lr", "fast", r"optim.lr is 'fast'; it must be of type float"),
        ("optim.lr", float("inf"), r"optim.lr is inf"),
        ("optim.lr", "nan", r"optim.lr is 'nan'; it must be of type float"),
        ("optim.lr", 10**400, r"optim.lr is 1000000"),
        ("optim.lr", "1" + "0" * 400, r"optim.lr is '1000000"),
        ("optim.lr", "1" + "0" * 5000, r"optim.lr is '1000000"),
        ("optim.max_steps", "1" + "0" * 400, r"optim.max_steps is '1000000"),
        ("run.seed", "-1", r"run.seed is -1; it must be in 0 .. 2\*\*31 - 1"),
        ("run.seed", 2**31, r"run.seed is 2147483648; it must be in 0"),
        ("data.subsample_seed", -1, r"data.subsample_seed is -1; it must be in 0"),
        ("optim.lr", 0, r"optim.lr is 0.0; it must be above 0"),
        ("optim.max_steps", 1.5, r"optim.max_steps is 1.5; it must be of type int"),
        ("optim.max_steps", "1.5", r"optim.max_steps is '1.5'; it must be of type int"),
        ("optim.batch_size", 0, r"optim.batch_size is 0; it must be at least 1"),
        (
            "objective.method",
            "dsss",
            r"must be one of finetune, dss, ib, kd, ib\+kd, cot.*; did you mean 'dss'",
        ),
        ("objective.method", True, r"objective.method is True; it must be one of"),
        ("run.dir", 2024, r"run.dir is 2024; it must be of type str"),  # in code: its text is not known
        ("run.dir", True, r"run.dir is True, or without a value; it must be of type str"),
        ("data.agree_use", "mi", r"unknown setting 'data.agree_use'. Did you mean"),
        ("data.unlabelled", "0", r"data.unlabelled is 0; it must be at least 1"),
        ("data.mixture_weights", "1,0", r"data.mixture_weights is 0.0; it must be above 0"),
        ("data.mixture_weights", "a,b", r"data.mixture_weights is 'a,b'; it must be of type list of float"),
        ("data.valid_share", 1.0, r"data.valid_share is 1.0; it must be between 0 and 1, both excluded"),
        ("run.export", 1, r"run.export is 1.*must be of type bool"),
        ("run.export", "yes", r"run.export is 'yes'.*must be of type bool"),
        ("data.subsample", 0.0, r"data.subsample is 0.0; it must be a share in \(0, 1\] or"),
        ("data.subsample", -0.5, r"data.subsample is -0.5; it must be a share in"),
        ("data.subsample", float("nan"), r"data.subsample is nan; it must be of type float"),
        ("data.subsample", 1.5, r"a share in \(0, 1\] or a whole number above 1"),
        ("data.task", 3, r"data.task is 3; it must be of type str or list of str"),
        ("student.dropout", 1.5, r"student.dropout is 1.5; it must be in \[0, 1\)"),
    ],
)
def test_what_is_refused_says_what_is_allowed(name, given, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, {name: given})


def test_messages_are_short_and_without_control_characters():
    for name, value in (
        ("run.final", "x" * 100_000),
        ("optim.lr", "\x1b[31m" * 1000),
        ("\x1b[31mred." + "x" * 100_000, "1"),
        ("optim.\x1b]0;title\x07", "1"),
        ("data.mixture_weights", ["x" * 1000] * 1000),
    ):
        with pytest.raises(ValueError) as error:
            load_settings(None, {name: value})
        assert len(str(error.value)) < 700 and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("given", "max_steps", "steps"),
    [
        ("0", 12, 0),
        ("1", 12, 1),
        (50, 600, 50),
        ("50.0", 600, 50),
        ("0.0833", 600, 50),
        ("0.1", 6, 1),  # 0.6
        ("0.05", 6, 0),  # 0.3
        ("0.25", 6, 2),  # 1.5; halves go to the even neighbour, as Python's round does
        ("0.75", 6, 4),  # 4.5
        ("0.99", 6, 6),
    ],
)
def test_warmup_is_a_share_or_a_number_of_steps(given, max_steps, steps):
    optim = load_settings(None, {"optim.warmup_steps": given, "optim.max_steps": max_steps}).optim
    assert optim.warmup_steps == steps and type(optim.warmup_steps) is int


@pytest.mark.parametrize("given", ["-1", "1.5", "-0.1"])
def test_warmup_that_is_neither_is_refused(given):
    with pytest.raises(ValueError, match=r"optim.warmup_steps is .*a share in \[0, 1\) or a whole number"):
        load_settings(None, {"optim.warmup_steps": given})


def test_recipes_warm_up_as_long_as_before_and_take_any_number_of_steps():
    found = {name: load_settings(name, {}).optim for name in ("demo", "demo_pretrain", "demo_teacher")}
    assert {name: (optim.warmup_steps, optim.max_steps) for name, optim in found.items()} == {
        "demo": (50, 600),
        "demo_pretrain": (100, 900),
        "demo_teacher": (50, 400),
    }
    assert load_settings("demo", {"optim.max_steps": "6"}).optim.warmup_steps == 0


def test_warmup_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match=r"optim.warmup_steps is 9, more than optim.max_steps \(5\)"):
        load_settings(None, {"optim.warmup_steps": 9, "optim.max_steps": 5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: [", r"bad.yaml is not valid YAML"),
        ("- 1", "must map sections to settings; it holds a list"),
        ("optim: 3", "'optim' must be a section with settings below it; it is '3'"),
        ("optim: {lr: 1, lr: 2}", r"is not valid YAML: 'lr' stands there twice"),
        ("optim: {lr: !!int x}", r"bad.yaml is not valid YAML"),
        ("[" * 100_000, r"bad.yaml is not valid YAML"),
        ("\x1b[31m: {a: 1}", r"bad.yaml is not valid YAML: .*special characters are not allowed"),
        ('"\\e[31m": {a: 1}', r"unknown setting '\\x1b\[31m.a'"),
        ('"\\e[31m": 1', r"'\\x1b\[31m' must be a section"),
        (b"optim: {lr: 1} # \xff", r"bad.yaml is not valid YAML"),
        ("data: {agree_use: mi}", r"unknown setting 'data.agree_use'"),
        ("run: {dir: null}", r"run.dir is None; it must be of type str"),
        ("run: {export: yes}", r"run.export is 'yes'; it must be of type bool"),
        ("optim: {learning_rate: 1}", "unknown setting 'optim.learning_rate'"),
        ("nonsense: {a: 1}", "unknown setting 'nonsense.a'"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_settings(str(path), {})


def test_a_recipe_is_read_as_it_is_written(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "run: {dir: 2024, seed: 1_0, export: False}\n"
        "data: {task: 10, path: ~, unlabelled: 010, mixture_weights: , label_source: gt, subsample: 3e2}\n"
        "optim: &o {lr: 3e-4, clip_norm: 0, adam_beta2: .95}\n"
        "student: {model: 1e3, tokenizer: on, lora_targets: [1, yes]}\n"
        "teacher: {placement: none, template: '{question} # 1'}\n"
    )
    loaded = load_settings(str(tmp_path / "r.yaml"), {})
    assert (loaded.run.dir, loaded.run.seed, loaded.run.export) == ("2024", 10, False)
    assert (loaded.data.task, loaded.data.path, loaded.data.mixture_weights) == ("10", None, None)
    assert (loaded.data.unlabelled, loaded.data.subsample) == (10, 300.0)
    assert (loaded.optim.lr, loaded.optim.clip_norm, loaded.optim.adam_beta2) == (3e-4, 0.0, 0.95)
    assert (loaded.student.model, loaded.student.tokenizer) == ("1e3", "on")
    assert loaded.student.lora_targets == ["1", "yes"] and loaded.teacher.placement == "none"


@pytest.mark.parametrize("recipe", [["demo"], 3, "x" * 300, "x" * 300 + ".yaml", "a\0b", "[demo,svamp]"])
def test_what_cannot_be_a_recipe(recipe):
    with pytest.raises(ValueError, match=r"recipe is (3|\['demo'\]); it must|no recipe '") as error:
        load_settings(recipe, {})
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"folder.yaml' cannot be read \(Is a directory\); shipped: .*demo"):
        load_settings(str(tmp_path / "folder.yaml"), {})


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
