"""The command line: what was typed is what the settings get."""

from __future__ import annotations

import pytest

from ibdistill.config import command_line
from ibdistill.config.load import load_settings


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        (["--optim.lr", "1e-3"], {"optim.lr": "1e-3"}),
        (["--optim.lr=1e-3"], {"optim.lr": "1e-3"}),
        (["--data.subsample", "-1"], {"data.subsample": "-1"}),
        (["--run.dir", "-v2"], {"run.dir": "-v2"}),
        (["--run.dir=--v2"], {"run.dir": "--v2"}),
        (["--run.dir="], {"run.dir": ""}),
        (["--run.dir", ""], {"run.dir": ""}),
        (["--run.dir", "run#1"], {"run.dir": "run#1"}),
        (["--run.dir", "(v2)"], {"run.dir": "(v2)"}),
        (["--run.dir", "10"], {"run.dir": "10"}),
        (["--run.dir", "'10'"], {"run.dir": "'10'"}),
        (["--run.dir", "a=b"], {"run.dir": "a=b"}),
        (["--run.dir=a=b c"], {"run.dir": "a=b c"}),
        (["--run.export", "--optim.lr", "1"], {"run.export": True, "optim.lr": "1"}),
        (["--optim.lr", "1", "--run.export"], {"optim.lr": "1", "run.export": True}),
        (["--run.keep-last", "3"], {"run.keep_last": "3"}),
        (["--local_rank=1", "--optim.lr", "1"], {"optim.lr": "1"}),
        (["--data.task", "svamp,cqa"], {"data.task": "svamp,cqa"}),
    ],
)
def test_names_and_the_text_of_their_values(typed, settings):
    given = command_line.parse(["demo", *typed])
    assert (given.first, given.settings, given.options, given.help) == ("demo", settings, {}, False)


def test_the_recipe_may_stand_behind_a_setting_with_its_value():
    given = command_line.parse(["--optim.lr", "1", "demo"])
    assert (given.first, given.settings) == ("demo", {"optim.lr": "1"})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        # bytes of an argument that are no UTF-8 reach Python as halves of surrogate pairs
        (["--run.dir", "a\udcff"], r"run.dir is 'a\\udcff'; it must be Unicode text"),
        (["--data.task", "[svamp, a\udcff]"], "data.task is .* must be Unicode text"),
        (["--teacher.template", "\0{question}"], "teacher.template is .* without a null character"),
        (["demo\udcff"], r"'demo\\udcff' is no text in UTF-8"),
    ],
)
def test_text_that_no_file_can_hold_is_refused(typed, message):
    with pytest.raises(ValueError, match=message):
        given = command_line.parse(typed)
        load_settings(given.first, given.settings)


@pytest.mark.parametrize(
    "folder", ["run#1", "(v2)", "10", "1e3", "[a]", "a,b", "true", "None", "'10'", "{x}"]
)
def test_text_settings_are_what_was_typed(folder):
    given = command_line.parse(["demo", "--run.dir", folder, "--data.demo_test_seed=3", "--run.export"])
    loaded = load_settings(given.first, given.settings)
    assert (loaded.run.dir, loaded.data.demo_test_seed, loaded.run.export) == (folder, 3, True)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--run.seed", "1", "--run.seed=2"], r"'run.seed' is given twice, as '1' and '2'; give it once"),
        (["--run.export", "--run.export"], r"'run.export' is given twice, as True and True"),
        (["--local_rank=0", "--local-rank", "1"], r"'local_rank' is given twice"),
        (
            ["demo", "stray"],
            r"unexpected arguments \('stray',\); settings are given as --section.field value",
        ),
        (["demo", "-x", "\x1b[31m"], r"unexpected arguments \('-x', '\\x1b\[31m'\)"),
    ],
)
def test_what_is_refused(typed, message):
    with pytest.raises(ValueError, match=message):
        command_line.parse(typed)


def test_a_name_without_a_point_is_an_unknown_setting():
    given = command_line.parse(["--lr", "1"])
    assert given.first is None
    with pytest.raises(ValueError, match=r"unknown setting 'lr'"):
        load_settings(given.first, given.settings)


def test_a_setting_without_its_value_says_so():
    given = command_line.parse(["demo", "--run.dir", "--optim.lr", "1"])
    with pytest.raises(ValueError, match=r"run.dir is True, or without a value; it must be of type str"):
        load_settings(given.first, given.settings)


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_is_asked_for_anywhere(asked):
    assert command_line.parse([asked]).help and command_line.parse(["demo", "x", asked]).help
    assert not command_line.parse([f"--run.dir={asked}"]).help


def test_a_programs_own_options_are_not_settings():
    given = command_line.parse(["demo", "--part", "0/8", "--run.seed", "1"], options=["part"])
    assert (given.options, given.settings) == ({"part": "0/8"}, {"run.seed": "1"})
    assert command_line.parse(["a", "b"], positions=2).positions == ["a", "b"]
