"""Conversations under chat templates: golden token ids, thoughts, turn ends, limits, and every refusal."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from chat_tokenizers import CHATML, THINKING, chatml, qwen, smollm2
from miniatures import read, read_refused
from tiny_models import byte_tokenizer

from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig
from ibdistill.data import chat, chat_features, chat_start, loading, token_ids
from ibdistill.data.batches import collate
from ibdistill.data.chat import Chat
from ibdistill.data.records import Record
from ibdistill.data.sampler import Sampler
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.data.tokenizing import tokenize

CONFIG = DataConfig(task="jsonl", format="chat", system="Be brief.")
GOLDEN = {
    "smollm2": (
        "1 9690 198 6077 5453 30 2 198 1 4093 198 1780 314 216 35 1232 216 36 47 2 198 1 520 9531 198",
        "44 17400 46 198 35 1232 216 36 446 216 39 30 198 9617 17400 46 198 198",
        "39 2",
    ),
    "qwen": (
        "151644 8948 198 3430 9814 13 151645 198 151644 872 198 3838 374 220 18 488 220 19 30 151645 198 "
        "151644 77091 198",
        "13708 766 397 18 488 220 19 284 220 22 624 522 26865 1339",
        "22 151645",
    ),
}
"""Prompt, rationale and answer, by the published tokenizers' own `apply_chat_template`."""
INSERTING = THINKING.replace("enable_thinking is false", "false")  # the block stands in the whole alone
STRIPPING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
SHOUTING = CHATML.replace("m['content'] +", "m['content'] | upper +")
USERS_ALONE = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
HALF_OPEN = STRIPPING.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")


def record(question="3 + 4 ?", label="7", rationale="start 3 . found means + 4 .", **more) -> Record:
    return Record("jsonl/train/0", "jsonl", question, label, rationale, gold=label, **more)


def features(tokenizer, records, streams, **settings):
    config = DataConfig(task="jsonl", format="chat", **settings)
    return tokenize(records, {"jsonl": TASKS["jsonl"].prefixes}, tokenizer, config, streams=streams)


def golden(name):
    """The small tokenizer; with IBDISTILL_CHAT_SMOLLM2 or ..._QWEN, the published one of that folder too."""
    made = [{"smollm2": smollm2, "qwen": qwen}[name]()]
    folder = os.environ.get(f"IBDISTILL_CHAT_{name.upper()}")
    return made + ([load_tokenizer(folder, "student.tokenizer")] if folder else [])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name):
    prompt, rationale, answer = ([int(i) for i in text.split()] for text in GOLDEN[name])
    for tokenizer in golden(name):
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert asked == prompt
        own = Chat.of(tokenizer, CONFIG, thinks=True)
        assert own.end == answer[-1] and not own.by_field
        question = record("What is 3 + 4?", "7", "3 + 4 = 7.")
        [row] = own.rows([("", (), question.question, question.rationale, question.label)])
        assert (row.prompt, row.rationale, row.answer) == (prompt, rationale, answer)
        assert own.prompts([("", (), question.question)], thinks=True) == [prompt]
        tables = chat_features.tables(
            [question], {"jsonl": TASKS["jsonl"].prefixes}, tokenizer, CONFIG, ("reason",)
        )
        assert (tables.prompts["reason"], tables.targets["rationale"]) == ([prompt], [rationale])


def test_rows_of_a_batch_are_the_rendered_conversation():
    """All places of the prompt are question positions, and nothing comes before or behind it."""
    tokenizer = chatml()
    records = [record(), record("1 + 1 ?", "2", "start 1 .")]
    made = features(tokenizer, records, ("predict", "explain", "reason"))
    batch = collate(made, [0, 1], made.streams, pad=0, start=3, separator=5)
    own = Chat.of(tokenizer, CONFIG)
    for s, stream in enumerate(made.streams):
        for i, r in enumerate(records):
            said = {"predict": r.label, "explain": r.rationale}.get(stream)
            said = said or f"<think>\n{r.rationale}\n</think>\n\n{r.label}"
            asked = "" if stream == "reason" else TASKS["jsonl"].prefixes[stream]
            talk = [{"role": "user", "content": asked + r.question}, {"role": "assistant", "content": said}]
            whole = tokenizer.apply_chat_template(talk, return_dict=False)
            stop = len(whole) - whole[::-1].index(own.end)
            row = batch.input_ids[2 * s + i][batch.attention_mask[2 * s + i].bool()].tolist()
            assert row == whole[: stop - 1]  # the turn's end is predicted and not read
    prompts = [len(made.questions["predict"][i]) for i in (0, 1)]
    width = batch.input_ids.shape[1]
    places = [*range(prompts[0]), *range(width, width + prompts[1])]
    assert batch.question_positions.tolist() == places
    packed = collate(made, [0, 1], made.streams, pad=0, start=3, separator=5, packed=True)
    assert packed.input_ids[0].tolist() == batch.input_ids[batch.attention_mask.bool()].tolist()
    assert packed.row_lengths.tolist() == batch.attention_mask.sum(1).tolist()
    assert packed.question_positions.tolist() == [*range(prompts[0])] + [
        packed.row_lengths[0].item() + place for place in range(prompts[1])
    ]
    last = [batch.labels["answer"][end - 1].item() for end in batch.cu["answer"][1:]]
    assert last == [own.end, own.end]


def test_bos_stands_once_where_the_template_writes_it():
    tokenizer = chatml("{{ bos_token }}" + CHATML, bos=True)
    [row] = Chat.of(tokenizer, CONFIG).rows([("", (), "a", None, "b")])
    assert row.prompt[0] == tokenizer.bos_token_id and row.prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [THINKING, INSERTING], ids=["in the prompt", "in the target"])
def test_empty_thoughts(template):
    tokenizer = chatml(template)
    config = DataConfig(task="jsonl", format="chat")
    own = Chat.of(tokenizer, config)
    [row] = own.rows([("", (), "a", None, "b")])
    prompt, said = tokenizer.decode(row.prompt), token_ids.read_back([row.answer], tokenizer)[0]
    assert own.empty_thoughts == (template == INSERTING)
    assert prompt.endswith("<think>\n\n</think>\n\n") == (template == THINKING)
    assert said == ("b" if template == THINKING else "<think>\n\n</think>\n\nb")
    assert chat.visible(said, config) == "b" and chat.visible("b </think> c", config) == "b </think> c"
    thinking = Chat.of(tokenizer, config, thinks=True)
    assert thinking.by_field
    [row] = thinking.rows([("", (), "a", "x y", "b")])
    assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row.rationale) == "<think>\nx y\n</think>\n\n"
    assert tokenizer.decode(row.answer) == "b<|im_end|>"


@pytest.mark.parametrize(
    "text", ["<think>x y</think>", " <think>\nx y\n</think>\n", "<think>x y", "x y</think>"]
)
def test_a_rationale_in_tags_is_taught_in_the_templates_tags(text):
    thinking = Chat.of(chatml(CHATML), CONFIG, thinks=True)
    bare, tagged = thinking.rows([("", (), "a", rationale, "b") for rationale in ("x y", text)])
    assert tagged == bare


def test_what_a_text_spells_is_text():
    tokenizer = chatml()
    made = features(tokenizer, [record("a <|im_end|> </think> b", rationale="</think> c")], ("reason",))
    row = made.questions["reason"][0].tolist()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.count(end) == 1
    text = tokenizer.decode(made.targets["rationale"][0])
    assert text.count("</think>") == 1 and text.strip().endswith("</think>")


def test_limits_cut_what_is_said_and_never_the_template(caplog):
    tokenizer = chatml()
    long = record(" ".join(["x"] * 40))
    made = features(tokenizer, [record(), long], ("predict",), max_question_tokens=30)
    frame = chat_start.overhead(tokenizer, DataConfig(format="chat"), ["predict"]) - 1
    assert made.cut["predict questions"] == 1 and len(made.questions["predict"][1]) == frame + 30
    assert tokenizer.decode(made.questions["predict"][1]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "1 of 2 predict questions are longer than 30 tokens and were cut" in caplog.text
    turns = (("system", "s", ""), ("user", "one", ""), ("assistant", "two", ""))
    for limit, seen in ((6, False), (60, True)):
        made = features(tokenizer, [record("3 ?", history=turns)], ("reason",), max_question_tokens=limit)
        text = tokenizer.decode(made.questions["reason"][0])
        assert ("one" in text and "two" in text) == seen and "system\ns<|im_end|>" in text and "3 ?" in text
        assert made.cut["reason questions"] == 1 - seen
    talk = [("user", "a b", ""), ("assistant", "c", "")]
    long = [record("1 ?" * n, history=tuple(talk * n)) for n in (1, 3, 9)]
    made = features(tokenizer, long, ("predict",), max_question_tokens=40)
    most = 39 + chat_start.overhead(tokenizer, DataConfig(format="chat"), ["predict"])
    assert made.questions["predict"].lengths.max() <= most and made.cut["predict questions"] > 0
    with pytest.raises(
        ValueError, match="the system message of jsonl/train/0 has [0-9]+ tokens, and data.max_"
    ):
        features(tokenizer, [record(history=turns[:1])], ("predict",), max_question_tokens=1)


@pytest.mark.parametrize("what", ["drop", "cut", "refuse"])
def test_a_long_rationale(what):
    tokenizer, limit = chatml(), 30
    long = record(rationale="start 3 . " * 20)
    settings = {"max_rationale_tokens": limit, "long_reasoning": what}
    if what == "refuse":
        with pytest.raises(ValueError, match="1 of 1 rationales of the reason stream are longer than 30"):
            features(tokenizer, [long], ("reason",), **settings)
        return
    made = features(tokenizer, [long], ("reason",), **settings)
    assert made.cut["reasonings"] == 1
    rationale = made.targets["rationale"][0]
    if what == "drop":
        assert not len(rationale) and not len(made.targets["answer"][0])
    else:
        assert len(rationale) == limit and tokenizer.decode(rationale).endswith("\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "thinks", "message"),
    [
        (USERS_ALONE, False,
         "leaves out what the assistant says"),
        (CHATML.replace("<|im_end|>", ""), False, "no special token behind the assistant's words"),
        (CHATML.replace("assistant\n' }}", "assistant: ' }}"), False, "from token [0-9]+ on the prompt goes"),
        (HALF_OPEN, False, "from token [0-9]+ on the prompt goes '.*<think>"),
        (STRIPPING, True, "swallow the tags '<think>' and '</think>'.*data.think_open"),
        (SHOUTING, False, "changes what the assistant says"),
        ("{{ raise_exception('only\x1b[31m users') }}", False, "refuses a conversation of system, user"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used(template, thinks, message):
    with pytest.raises(ValueError, match=message):
        Chat.of(chatml(template), CONFIG, thinks=thinks)


def test_a_template_reads_one_date_every_day():
    """Llama 3.2's and SmolLM3's write the day's own; a run that goes on tomorrow would have other prompts."""
    for form in ("%d %b %Y", "%d %B %Y", "%f"):
        dated = Chat.of(chatml(f"{{{{ strftime_now('{form}') }}}}" + CHATML), CONFIG)
        assert dated.text([{"role": "user", "content": "x"}]).startswith("26 Jul 2024<|im_start|>user")


def test_no_template_and_tags_that_the_tokenizer_swallows():
    with pytest.raises(ValueError, match="the tokenizer has no chat template; take the tokenizer of an"):
        Chat.of(byte_tokenizer(), CONFIG)
    tokenizer = chatml()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(ValueError, match="or its special tokens, swallow the tags"):
        Chat.of(tokenizer, CONFIG, thinks=True)
    assert Chat.of(tokenizer, DataConfig(format="chat", think_open="Think:", think_close="So:"), thinks=True)


def test_a_base_student_beside_an_instructed_teacher_is_refused(tmp_path, caplog):
    student, teacher = chatml(), chatml()
    teacher.eos_token = "<|im_end|>"
    teacher.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"'<\|end\|>' \(0\), the teacher's with '<\|im_end\|>'.*--student.tok.*alignment text",
    ):
        chat_start.settle(student, CONFIG, ["reason"], str(tmp_path), record())
    student.eos_token = "<|im_end|>"
    teacher.chat_template = "{{ 'x' }}" + CHATML
    teacher.save_pretrained(tmp_path)
    caplog.set_level("INFO")
    chat_start.settle(student, CONFIG, ["reason"], str(tmp_path), record())
    assert "chat: student, reason: BOS None" in caplog.text and "chat: teacher, reason" in caplog.text
    assert "the teacher's own template renders the reason stream otherwise" in caplog.text
    alone = chatml()
    caplog.clear()
    chat_start.settle(alone, CONFIG, ["reason"], "", replace(record(), rationale=""))
    assert "(a text that this record lacks)" in caplog.text
    assert alone.eos_token == "<|im_end|>" and "a turn ends with '<|im_end|>'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.system": "x"}, "data.system goes with data.format chat"),
        ({"data.format": "chat", "objective.method": "cot", "data.answer_marker": "So:"}, "data.think_close"),
        (
            {"data.format": "chat", "teacher.rationales": "all", "teacher.placement": "replica"}
            | {"teacher.model": "demo-teacher"},
            "set teacher.template",
        ),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, settings)


def turn(role, content, **more):
    return {"role": role, "content": content} | more


TALK = [
    turn("system", "s"),
    turn("user", "3 + 4 ?"),
    turn("assistant", "7", reasoning_content="start 3 ."),
    turn("user", "+ 1 ?"),
    turn("assistant", "<think>\nfound 1 .\n</think>\n\n8"),
]


def write(folder, rows):
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("loss_on", ["all_turns", "last_turn"])
def test_conversations(tmp_path, loss_on):
    write(tmp_path, [{"messages": TALK}])
    config = DataConfig(task="jsonl", path=str(tmp_path), format="chat", loss_on=loss_on)
    loaded = loading.load(config, needs_rationale=True)
    [asked] = loaded.test["jsonl"]
    assert (asked.question, asked.label, asked.rationale) == ("+ 1 ?", "8", "found 1 .")
    assert asked.history == (("system", "s", ""), ("user", "3 + 4 ?", ""), ("assistant", "7", "start 3 ."))
    *earlier, last = loaded.train
    assert last.history == asked.history and len(earlier) == (loss_on == "all_turns")
    tokenizer = chatml(THINKING)
    made = features(tokenizer, loaded.train, ("reason",))
    before = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n3 + 4 ?<|im_end|>\n<|im_start|>assistant\n"
    after = "7<|im_end|>\n<|im_start|>user\n+ 1 ?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(made.questions["reason"][len(made) - 1]) == before + after
    if earlier:
        assert (earlier[0].question, earlier[0].label, earlier[0].rationale) == ("3 + 4 ?", "7", "start 3 .")
        assert tokenizer.decode(made.questions["reason"][0]) == before
        assert loaded.report["jsonl/train/questions"] == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (TALK[:4], "train.jsonl:1: field 'messages' ends with a user's turn ('+ 1 ?')"),
        (TALK[:1], "has the roles 'system'"),
        (TALK[1:3] + TALK[2:3], "must take turns"),
        ([turn("tool", "x")], "message 0 has the role 'tool'"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([turn("user", " "), turn("assistant", "x")], "message 0, of the role user, says nothing"),
        (["x"], "message 0 is 'x'"),
        ({}, "must be a list of messages"),
    ],
)
def test_conversations_that_are_refused(tmp_path, messages, message):
    write(tmp_path, [{"messages": messages}])
    read_refused(message, "jsonl", tmp_path, format="chat")


def test_a_conversation_in_format_plain(tmp_path):
    write(tmp_path, [{"messages": TALK[1:3]}])
    [example] = read("jsonl", tmp_path)["train"]
    assert (example.record.question, example.record.label, example.record.history) == ("3 + 4 ?", "7", ())
    write(tmp_path, [{"messages": TALK}])
    read_refused("set data.format chat", "jsonl", tmp_path)


def test_one_of_several_rationales_is_drawn_in_each_epoch(tmp_path):
    rows = [{"question": f"q {i} ?", "label": "x", "rationales": [f"r{k}" for k in range(i % 4 + 1)]}
            for i in range(12)]  # fmt: skip
    write(tmp_path, rows)
    config = DataConfig(task="jsonl", path=str(tmp_path), max_rationale_tokens=32)
    loaded = loading.load(config, needs_rationale=True)
    assert len(loaded.train) == 30 and loaded.report["jsonl/train/questions"] == 12
    assert len(loading.load(config, needs_rationale=False).train) == 12
    made = tokenize(loaded.train, {"jsonl": TASKS["jsonl"].prefixes}, byte_tokenizer(), config)
    sampler, seen = Sampler(made, config, batch_size=4, seed=3), {}
    assert sampler.steps_per_epoch == 3
    for epoch in range(40):
        drawn = np.concatenate([sampler.step(3 * epoch + i) for i in range(3)])
        names = [loaded.train[row].sample_of or loaded.train[row].id for row in drawn]
        assert len(set(names)) == 12  # each question once
        for row, name in zip(drawn, names, strict=True):
            seen.setdefault(name, []).append(row)
    for name, own in seen.items():
        assert len(set(own)) == int(name.split("/")[-1]) % 4 + 1
    again = Sampler(made, config, batch_size=4, seed=3)
    for step in (100, 7, 55):
        assert again.step(step).tolist() == sampler.step(step).tolist()
    part = made.take([row for row in range(30) if row not in (1, 2)])
    both = part + part
    assert len(set(both.samples)) == 2 * len(set(part.samples))


def test_rationales_that_are_refused(tmp_path):
    for value, message in (
        ([], "must be a list of texts|no rationale"),
        ([""], "none empty"),
        ("x", "a list of"),
    ):
        write(tmp_path, [{"question": "q", "label": "x", "rationales": value}])
        if value:
            read_refused(message, "jsonl", tmp_path)
    write(tmp_path, [{"question": "q", "label": "x", "rationale": "y", "rationales": ["x"]}])
    read_refused("exclude each other", "jsonl", tmp_path)


@pytest.mark.parametrize(
    ("said", "beside"),
    [
        ({}, {"label": "7"}),
        ({}, {"rationale": "3 and 4 make 7."}),
        ({"reasoning_content": "Count on."}, {"rationale": "3 and 4 make 7."}),
        ({"reasoning_content": "Count on."}, {"rationales": ["3 and 4 make 7."]}),
    ],
)
def test_what_the_assistant_says_stands_once(tmp_path, said, beside):
    messages = [{"role": "user", "content": "3 + 4 ?"}, {"role": "assistant", "content": "7", **said}]
    write(tmp_path, [{"messages": messages, **beside}])
    read_refused(f"the fields 'messages' and '{next(iter(beside))}' exclude each other", "jsonl", tmp_path)


def test_rationales_beside_a_conversation_without_one(tmp_path):
    messages = [{"role": "user", "content": "3 + 4 ?"}, {"role": "assistant", "content": "7"}]
    row = {"messages": messages, "label": None, "rationales": ["3 and 4 make 7.", "Count on from 3."]}
    write(tmp_path, [row | {"id": str(i)} for i in range(12)])
    loaded = loading.load(DataConfig(task="jsonl", path=str(tmp_path)), needs_rationale=True)
    assert {r.rationale for r in loaded.train} == set(row["rationales"]) and loaded.train[0].label == "7"
