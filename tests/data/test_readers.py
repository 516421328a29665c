"""Readers: every layout in miniature, and every refusal's text."""

import gzip
import json

import pyarrow
import pyarrow.parquet as pyarrow_parquet
import pytest
from miniatures import array, lines, read, read_refused

from ibdistill.data.json_rows import rows_of


def svamp(n, first=0):
    return [{"input": f"Body {i}.\nHow many?", "label": f"( {i}.0 - 1.0 )"} for i in range(first, first + n)]


def release(root, name="svamp", n=4, form=lines):
    form(root / name / f"{name}_train.json", svamp(n))
    form(root / name / f"{name}_test.json", svamp(2))
    return root


def said(split, n):
    return [f"{split} reason {i}. The answer is ({i} - 1)." for i in range(n)]


@pytest.mark.parametrize("form", [lines, array])
def test_release(tmp_path, form):
    release(tmp_path, form=form)
    array(tmp_path / "svamp/llm/train_CoT_0.json", said("train", 4)[:3])
    array(tmp_path / "svamp/llm/train_CoT_1.json", said("train", 4)[3:])
    array(tmp_path / "svamp/llm/test_CoT_0.json", said("test", 2))
    for path in (tmp_path, tmp_path / "svamp"):
        splits = read("svamp", path, needs_rationale=True)
        assert list(splits) == ["train", "test"]
        assert [e.llm for e in splits["train"]] == said("train", 4)
        assert [e.llm for e in splits["test"]] == said("test", 2)
        first = splits["train"][0]
        assert first.record.id == "svamp/train/0" and first.record.question == "Body 0.\nHow many?"
        assert first.record.label == first.record.gold == "( 0.0 - 1.0 )"
        assert "svamp_train.json" in first.where


def test_release_of_gpt_neox(tmp_path, monkeypatch):
    release(tmp_path)
    array(tmp_path / "gpt-neox/svamp/train.json", said("neox", 4))
    assert read("svamp", tmp_path, llm="gpt-neox")["train"][3].llm == said("neox", 4)[3]
    monkeypatch.chdir(tmp_path / "svamp")
    splits = read("svamp", ".", llm="gpt-neox")
    assert splits["train"][0].llm == said("neox", 4)[0] and splits["test"][0].llm is None


def test_more_than_ten_llm_files_are_read_in_order_of_their_numbers(tmp_path):
    release(tmp_path, n=12)
    for k in range(12):
        array(tmp_path / f"svamp/llm/train_CoT_{k}.json", [said("train", 12)[k]])
    assert [e.llm for e in read("svamp", tmp_path)["train"]] == said("train", 12)


def test_release_problems(tmp_path):
    read_refused("does not exist", "svamp", tmp_path / "none")
    message = f"looked for svamp_train.json or SVAMP.json in {tmp_path / 'svamp'} and {tmp_path}"
    read_refused(message, "svamp", tmp_path)
    read_refused("looked for esnli_train.json in", "esnli", tmp_path)
    release(tmp_path)
    read_refused(
        f"looked for {tmp_path / 'svamp/llm/train_CoT_*.json'}", "svamp", tmp_path, needs_rationale=True
    )
    read_refused("--objective.method finetune", "svamp", tmp_path, label_source="llm")
    neox = tmp_path / "gpt-neox/svamp/train.json"
    read_refused(f"looked for {neox}", "svamp", tmp_path, needs_rationale=True, llm="gpt-neox")
    assert len(read("svamp", tmp_path)["train"]) == 4  # fine where nobody needs them
    array(tmp_path / "svamp/llm/train_CoT_0.json", said("train", 3))
    read_refused("holds 3 LLM outputs, but the train split of", "svamp", tmp_path)
    read_refused("has 4 records; they must be as many", "svamp", tmp_path)
    array(tmp_path / "svamp/llm/train_CoT_0.json", ["x", "x", "x", 4])
    read_refused("train_CoT_0.json: item 3: expected the LLM's text, found int", "svamp", tmp_path)
    (tmp_path / "svamp/llm/train_CoT_0.json").rename(tmp_path / "svamp/llm/train_CoT_1.json")
    read_refused("train_CoT_0.json is missing although", "svamp", tmp_path)
    (tmp_path / "svamp/svamp_test.json").unlink()
    read_refused("svamp_test.json is missing beside svamp_train.json", "svamp", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"input": "q", "label": "1"}\n{"input": \n', "svamp_train.json:2: not valid JSON (Expecting value"),
        ('[{"input": "q", "label": "1"},\n\n {"input": }]', "svamp_train.json:3: not valid JSON"),
        ("[" * 100_000, "svamp_train.json:1: not usable JSON"),
        ('\n"text"\n', "svamp_train.json:2: expected a JSON object, found str"),
        ("[[]]", "svamp_train.json: item 0: expected a JSON object, found list"),
        (
            '{"input": "q"}',
            "svamp_train.json:1: no 'label' for task 'svamp'; the record has the fields input",
        ),
        ('{"input": "q", "label": " "}', "svamp_train.json:1: the label is empty"),
        ('{"input": "", "label": "1"}', "svamp_train.json:1: the question is empty"),
        ('{"input": "q", "label": null}', "svamp_train.json:1: field 'label' is None; it must be text or"),
        ('{"input": "q", "label": true}', "svamp_train.json:1: field 'label' is True"),
        ('{"input": "q", "label": NaN}', "svamp_train.json:1: field 'label' is nan, which is no number"),
        ('{"input": "q", "label": -Infinity}', "svamp_train.json:1: field 'label' is -inf, which is no"),
        ('{"input": "q", "label": 1e999}', "svamp_train.json:1: field 'label' is inf, which is no number"),
        ('[{"input": NaN, "label": "1"}]', "svamp_train.json: item 0: field 'input' is nan"),
        (
            "input,label\nq,1\n",
            "svamp_train.json:1: not valid JSON (Expecting value, column 1); expected one",
        ),
        (
            '{"input": "q", "label": "1"}\n{"input": "q \\ud83d", "label": "1"}',
            "svamp_train.json:2: the text 'q \\ud83d' has half of a surrogate pair ('\\ud83d')",
        ),
        ('[{"input": "q", "label": "\\uDE00"}]', "svamp_train.json: item 0: the text '\\ude00' has half"),
        ('{"input": "q", "label": "1", "\\ud800": 1}', "svamp_train.json:1: the text '\\ud800' has half"),
        ('{"input": "q", "label": "1", "x": [{"y": "\\ud83d\\ud83d"}]}', "svamp_train.json:1: the text"),
        ('{"data": [1]}', "svamp_train.json:1: no 'Body' for task 'svamp'; the record has the fields data"),
        ("\n", "the train split of task 'svamp' is empty"),
        ("[]", "the train split of task 'svamp' is empty"),
    ],
)
def test_bad_rows(tmp_path, text, message):
    release(tmp_path)
    (tmp_path / "svamp/svamp_train.json").write_text(text)
    read_refused(message, "svamp", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    release(tmp_path)
    (tmp_path / "svamp/svamp_train.json").write_bytes(b'{"input": "caf\xe9"}')
    read_refused("svamp_train.json: byte 14 is not UTF-8", "svamp", tmp_path)


def test_an_llm_s_text_with_half_a_character(tmp_path):
    release(tmp_path)
    array(tmp_path / "svamp/llm/train_CoT_0.json", [*said("train", 3), "\ud83d. The answer is (1)."])
    read_refused("train_CoT_0.json: item 3: the text '\\ud83d. The answer", "svamp", tmp_path)


def test_an_escaped_pair_is_one_character(tmp_path):
    release(tmp_path)
    (tmp_path / "svamp/svamp_train.json").write_text('{"input": "\\ud83d\\ude00", "label": "1"}')
    assert read("svamp", tmp_path)["train"][0].record.question == "\U0001f600"


@pytest.mark.parametrize(
    ("number", "text"),
    [("0", "0"), ("0.0", "0"), ("-0.0", "0"), ("8.50", "8.5"), ("1e22", "1" + "0" * 22), ("100", "100"),
     ("1e-7", "0.0000001"), ("12345678901234567890", "12345678901234567890"), ('"0.0"', "0.0")],
)  # fmt: skip
def test_a_number_is_read_as_its_value(tmp_path, number, text):
    (tmp_path / "all.jsonl").write_text(f'{{"question": "q", "label": {number}}}\n' * 20)
    assert read("jsonl", tmp_path / "all.jsonl")["train"][0].record.label == text


ROWS = [{"question": f"q{i}", "label": i / 2} for i in range(20)]


def write_plain(path):
    lines(path, ROWS)


def write_data(path):
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))


def write_gzip(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_parquet(path):
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_plain, "all.jsonl"),
        (write_data, "all.json"),
        (write_gzip, "all.jsonl.gz"),
        (write_gzip, "all.jsonl"),
        (write_parquet, "all.parquet"),
        (write_parquet, "all.jsonl"),
    ],
)
def test_forms_of_a_file(tmp_path, write, name):
    write(tmp_path / name)
    lines(tmp_path / "same", ROWS)
    found = {split: [e.record for e in part] for split, part in read("jsonl", tmp_path / name).items()}
    wanted = {split: [e.record for e in part] for split, part in read("jsonl", tmp_path / "same").items()}
    assert found == wanted and len(found["train"]) == 18


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("\ufeff{}\r\n\r{}\r\r\n{}\n", [":1", ":3", ":5"]),
        ("\n \u2028\n{}\n\x85\n{}", [":3", ":5"]),
        ("{}\r{}\r", [":1", ":2"]),
        (' \n{\n"data":\n[{}, {}]}', [": item 0 of 'data'", ": item 1 of 'data'"]),
        ('{"data": [{}]}\n{"data": [{}]}', [":1", ":2"]),
        ("\n\n[{},\n{}]", [": item 0", ": item 1"]),
        ("5\n[1]", [":1", ":2"]),
    ],
    ids=["breaks", "blank", "old-mac", "object", "two-objects", "array", "values"],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_places_of_rows_in_any_order(tmp_path, text, places, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(text.encode()))
    rows = rows_of(path)
    assert [where for where, _ in rows] == [f"{path}{place}" for place in places]
    assert [rows[i] for i in (-1, 0)] == [list(rows)[-1], rows[:1][0]] and len(rows) == len(places)


def test_rows_of_parquet_in_any_order(tmp_path):
    path = tmp_path / "file"
    table = pyarrow.Table.from_pylist([{"n": i} for i in range(5000)])
    pyarrow_parquet.write_table(table, path, row_group_size=1500)
    rows = rows_of(path)
    assert [rows[i][1]["n"] for i in (4999, 0, 1024, 1023, 1499, 1500, -1)] == [
        *(4999, 0, 1024, 1023, 1499, 1500, 4999)
    ]
    assert list(rows) == [(f"{path}: row {i}", {"n": i}) for i in range(5000)]


def test_a_folder_may_hold_other_forms(tmp_path):
    write_parquet(tmp_path / "train.parquet")
    write_gzip(tmp_path / "test.jsonl.gz")
    assert [len(part) for part in read("jsonl", tmp_path).values()] == [20, 20]
    write_plain(tmp_path / "train.jsonl")
    read_refused("holds the train split several times (train.jsonl, train.parquet)", "jsonl", tmp_path)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "all.jsonl"
    write_gzip(path)
    path.write_bytes(path.read_bytes()[:-9])
    read_refused(f"{path}: the gzip file is damaged", "jsonl", path)
    path.write_bytes(b"\x1f\x8b" + b"\x08" * 40)
    read_refused(f"{path}: the gzip file is damaged", "jsonl", path)
    path.write_bytes(b"PAR1 and nothing")
    read_refused(f"{path}: the Parquet file is damaged", "jsonl", path)
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"question": "q"}]), path)
    read_refused(f"{path}: row 20: field 'label' is None", "jsonl", path)


def test_unicode_survives(tmp_path):
    text = "caf\u00e9 \u2028 \U0001f600"
    row = {"input": text, "label": "1"}
    release(tmp_path)
    path = tmp_path / "svamp/svamp_train.json"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read("svamp", tmp_path)["train"][0].record.question == text


def test_jsonl_folder_and_field_names(tmp_path):
    for split in ("train", "valid", "test"):
        lines(
            tmp_path / f"{split}.jsonl", [{"q": split, "a": 5, "why": None}, {"q": "2", "a": "b", "why": "c"}]
        )
    names = {"question_field": "q", "label_field": "a", "rationale_field": "why"}
    splits = read("jsonl", tmp_path, **names)
    assert list(splits) == ["train", "valid", "test"]
    first, second = (e.record for e in splits["valid"])
    assert (first.id, first.question, first.label, first.rationale) == ("jsonl/valid/0", "valid", "5", "")
    assert (second.label, second.rationale) == ("b", "c")
    read_refused(
        "train.jsonl:1: no 'question' for task 'jsonl'; the record has the fields q, a, why",
        "jsonl",
        tmp_path,
    )
    (tmp_path / "test.jsonl").unlink()
    read_refused("lacks test.jsonl: a folder for the task 'jsonl' has", "jsonl", tmp_path)
    read_refused("data.path is not set: the task 'jsonl' needs", "jsonl")
    read_refused("does not exist", "jsonl", tmp_path / "none.jsonl")


def test_jsonl_file_is_split_the_same_way_every_time(tmp_path):
    lines(tmp_path / "all.jsonl", [{"question": f"q{i}", "label": "x"} for i in range(21)])
    splits = read("jsonl", tmp_path / "all.jsonl")
    assert splits == read("jsonl", tmp_path / "all.jsonl")
    ids = {split: {e.record.id for e in examples} for split, examples in splits.items()}
    assert len(ids["test"]) == 3 and len(ids["train"]) == 18 and not ids["train"] & ids["test"]


NLI = {"premise": "P", "hypothesis": "H", "label": 0}
HUB = {
    "svamp": (
        *("ChilleD/SVAMP", None),
        {"Body": "B.", "Question": "Q?", "Equation": "( 1.0 + 1.0 )"},
        ["train", "test"],
    ),
    "asdiv": (
        *("EleutherAI/asdiv", None),
        {"body": "B.", "question": "Q?", "answer": "9 (hats)"},
        ["validation"],
    ),
    "cqa": (
        *("Salesforce/cos_e", "v1.11"),
        {"question": "Q?", "choices": ["a", "b"], "answer": "b"},
        ["train", "validation"],
    ),
    "gsm8k": ("openai/gsm8k", "main", {"question": "Q?", "answer": "So.\n#### 3"}, ["train", "test"]),
    "esnli": ("esnli/esnli", None, NLI, ["train", "validation", "test"]),
    "anli2": ("facebook/anli", None, NLI, ["train_r2", "dev_r2", "test_r2"]),
}


@pytest.mark.parametrize("task", HUB)
def test_hub(task, monkeypatch):
    import datasets

    path, name, row, splits = HUB[task]
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return {split: [row] * (2 + i) for i, split in enumerate(splits)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read(task)
    assert calls[0][0] == (path, name)
    sizes = {split: len(examples) for split, examples in found.items()}
    assert sizes == {
        "asdiv": {"train": 1, "test": 1},
        "esnli": {"train": 2, "valid": 3, "test": 4},
        "anli2": {"train": 2, "valid": 3, "test": 4},
    }.get(task, {"train": 2, "test": 3})
    assert found["train"][0].record.label in ("( 1.0 + 1.0 )", "9", "b", "3", "entailment")
    assert found["train"][0].where.startswith(f"{path} ")


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_refused(
        "data.path is not set and openai/gsm8k cannot be loaded from the hub (ConnectionError: no route)",
        "gsm8k",
    )
