"""The export: a card that credits and can be run, generation settings with a length, the prompt as a chat
template."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from card_lines import answers_by_card
from chat_tokenizers import qwen, smollm2
from tiny_models import TEXTS, byte_tokenizer, save, tiny
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ibdistill.config.methods import DIVERGENCES, HEAD_ESTIMATORS, QUESTION_ESTIMATORS, SAMPLED
from ibdistill.config.sections import Config, DataConfig, ObjectiveConfig, StudentConfig, TeacherConfig
from ibdistill.data import batches, tokenizers
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import tokenize
from ibdistill.models import card_head, decoding, export, families, model_card
from ibdistill.models.prompt import Prompt
from ibdistill.models.student import load_student
from ibdistill.ops.head_loss import divergences, sampled_token

DSS, MI, VID, VIB, INFONCE = "2305.02301", "2403.03348", "1904.05835", "1612.00410", "1807.03748"
HINTON, MINILLM, GKD = "1503.02531", "2306.08543", "2306.13649"


@pytest.mark.parametrize(
    ("settings", "papers"),
    [
        ({"method": "finetune"}, []),
        ({"method": "dss"}, [DSS]),
        ({"method": "ib", "estimator": "paper"}, [DSS, MI]),
        ({"method": "ib", "estimator": "normalized"}, [DSS, MI]),
        ({"method": "ib", "estimator": "infonce"}, [DSS, MI, INFONCE]),
        ({"method": "ib", "estimator": "vid"}, [DSS, VID]),
        ({"method": "ib", "estimator": "vib"}, [DSS, VIB]),
        ({"method": "ib", "estimator": "paper", "beta": 0.0}, [DSS]),
        ({"method": "kd", "estimator": "paper"}, [DSS, HINTON]),
        ({"method": "kd", "divergence": "reverse"}, [DSS, MINILLM]),
        ({"method": "kd", "divergence": "jsd"}, [DSS, GKD]),
        ({"method": "ib+kd", "estimator": "vid"}, [DSS, VID, HINTON]),
        ({"method": "ib+kd", "estimator": "vid", "gamma": 0.0}, [DSS, VID]),
    ],
)
def test_the_card_credits_each_method_with_its_own_papers(settings, papers):
    config = Config(objective=ObjectiveConfig(**{"beta": 0.1} | settings))
    prompt = Prompt.of(tiny("t5"), byte_tokenizer(), config)
    card = model_card.card(config, prompt, {"demo": 1})
    assert re.findall(r"arXiv\s+([\d.]+\d)", card) == papers
    assert ("rationale = answer(" in card) == (settings["method"] != "finetune")
    assert '"demo": 1' in card


@pytest.mark.parametrize("method", ["finetune", "dss"])
def test_the_card_of_a_mixture_has_every_tasks_prefixes(method):
    tasks = ["svamp", "esnli", "anli1"]
    config = Config(data=DataConfig(task=tasks), objective=ObjectiveConfig(method=method))
    prompt = Prompt.of(tiny("t5"), byte_tokenizer(), config)
    card = model_card.card(config, prompt, {})
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in re.findall(r"(?m)^\|.*\|$", card)]
    streams = list(prompt.prefixes)
    assert rows[0] == ["task", *streams] and ("explain" in streams) == (method == "dss")
    assert {row[0]: [json.loads(cell) for cell in row[1:]] for row in rows[2:]} == {
        task: [TASKS[task].prefixes[stream] for stream in streams] for task in tasks
    }
    assert "have that of svamp:" in card
    alone = model_card.card(Config(data=DataConfig(task="svamp")), prompt, {})
    assert "|" not in alone.split("## Scores")[0].split("## Use")[1]


def test_the_card_says_why_a_text_in_16_bits_may_differ():
    cards = []
    for precision in ("fp32", "bf16"):
        config = Config(student=StudentConfig(precision=precision))
        prompt = Prompt.of(tiny("t5"), byte_tokenizer(), config)
        cards.append(model_card.card(config, prompt, {}))
    assert "These lines give the answers that were evaluated:\n" in cards[0]
    assert "evaluated, up to rounding. The weights are in bf16, where" in cards[1]
    assert f"batches of {Config().run.eval_batch_size} questions" in cards[1]


@pytest.mark.parametrize(
    ("method", "mapped", "said"),
    [
        ("dss", False, ":\n"),
        (
            "cot",
            False,
            "; but the evaluation and `ask.py` also look by the rule of the task for an answer",
        ),
        (
            "dss",
            True,
            "; but the evaluation and `ask.py` also write `n0`, `n1`, ... for the numbers of a ques",
        ),
        ("cot", True, "for an answer that is not marked and write `n0`, `n1`, ..."),
    ],
)
def test_the_card_says_what_its_lines_leave_out(method, mapped, said):
    data = DataConfig(task="svamp", map_numbers=mapped)
    config = Config(data=data, objective=ObjectiveConfig(method=method))
    card = model_card.card(config, Prompt.of(tiny("llama"), byte_tokenizer(), config), {})
    line = next(line for line in card.splitlines(True) if line.startswith("These lines give"))
    assert said in line


@pytest.mark.parametrize("model_type", ["t5", "llama", "qwen2"])
def test_a_text_in_16_bits_differs_only_where_two_tokens_are_nearly_as_probable(model_type):
    """What the card says: in another batch the same question is answered alike up to such a place."""
    model, tokenizer = tiny(model_type).to(torch.bfloat16), byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    questions = [f"{text} {i}" for i, text in enumerate(TEXTS)]
    limits = {"max_question_tokens": 64, "max_new_tokens": 24, "device": torch.device("cpu")}
    together = decoding.decode(model, tokenizer, questions, **limits)
    for question, other in zip(questions, together, strict=True):
        [alone] = decoding.decode(model, tokenizer, [question], **limits)
        n = next((i for i, (a, b) in enumerate(zip(alone.ids, other.ids, strict=False)) if a != b), None)
        if n is None:
            assert alone.ids == other.ids
        else:  # a probability that two batches give to their own first choice at one place
            assert abs(alone.log_probs[n] - other.log_probs[n]) < 0.1
            assert alone.log_probs[n] < math.log(0.55)


def test_no_bar_of_a_library_reaches_the_console(world, tmp_path, capfd):
    """Neither of writing shards nor of loading them."""
    model = tiny("t5")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    type(model).from_pretrained(tmp_path)
    assert "|" not in capfd.readouterr().err


def test_every_estimator_and_divergence_has_a_credit():
    assert {*HEAD_ESTIMATORS, *QUESTION_ESTIMATORS} == model_card._ESTIMATORS.keys()
    assert set(DIVERGENCES) == divergences.DIVERGENCES.keys()
    assert set(SAMPLED) == sampled_token.SAMPLED.keys()
    every = [*divergences.DIVERGENCES.values(), *sampled_token.SAMPLED.values()]
    assert all(divergence.paper for divergence in every)


QUESTIONS = ["how many are there in all?", 'she said "yes."', "( 3 + 4 )", "wait...", "a", "7", "two\nlines"]


def padded(**kwargs) -> PreTrainedTokenizerFast:
    """The byte tokenizer as `load_tokenizer` gives it."""
    tokenizer = byte_tokenizer(**kwargs)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def joining_tokenizer(ending: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text as Qwen's does; an ending and the newline behind it are one token."""
    core = Tokenizer(bpe.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\p{N}| |\n"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<|end|>"], "initial_alphabet": alphabet, "vocab_size": 300}
    core.train_from_iterator([f"all{ending}\n how{ending}\n"] * 9, trainers.BpeTrainer(**special))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


@pytest.mark.parametrize(
    ("model_type", "bos", "demo"),
    [
        ("llama", False, False),
        ("llama", True, False),
        ("llama", False, True),
        ("t5", False, False),
        ("t5", False, True),
    ],
)
def test_the_chat_template_gives_the_ids_of_training(tmp_path, model_type, bos, demo):
    tokenizer = tokenizers.demo_tokenizer() if demo else padded(bos=bos)
    tokenizer.chat_template = "{{ 'You are a helpful assistant.' }}"
    config = Config(data=DataConfig(task="svamp"))
    ends = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    model = tiny(model_type, **ends if model_type == "t5" else {})
    export.write(model, tokenizer, tmp_path, config)
    assert "helpful" in tokenizer.chat_template  # the run's own tokenizer is as it was
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    records = [Record(f"r{i}", "svamp", text, "1", "so", gold="1") for i, text in enumerate(QUESTIONS)]
    features = tokenize(records, {"svamp": TASKS["svamp"].prefixes}, tokenizer, config.data)
    streams = ("predict", "explain")
    batch = batches.collate(features, range(len(records)), streams, **families.layout(model, tokenizer))
    for row, (stream, i) in enumerate((stream, i) for stream in streams for i in range(len(records))):
        length = int(batch.attention_mask[row].sum())
        if model_type == "llama":  # the row holds the target too, but for its last token
            length -= len(features.targets[stream][i]) - 1
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[i]}]
        asked = {"explain": True} if stream == "explain" else {}
        ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **asked)
        assert ids == batch.input_ids[row, :length].tolist()


@pytest.mark.parametrize("ending", ["?", "}", "=>"])
def test_there_is_no_chat_template_where_no_text_has_the_prompts_ids(tmp_path, caplog, ending):
    """Whatever ending the vocabulary joins; card and log name it."""
    tokenizer = joining_tokenizer(ending)
    tokenizer.chat_template = "{{ messages }}"
    export.write(tiny("llama"), tokenizer, tmp_path, Config())
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    card = (tmp_path / "README.md").read_text()
    assert "There is no chat template" in card and "`ask.py`" in card and "`data.format chat`" in card
    for text in (card, caplog.text):
        assert (
            f"{ending}' the prompt of training ends with the tokens ['{ending}', '\\n'], and a text" in text
        )


@pytest.mark.parametrize("name", ["smollm2", "qwen"])
def test_of_published_vocabularies_those_that_join_are_refused(tmp_path, name):
    """The cut-out ones; with IBDISTILL_CHAT_SMOLLM2 or ..._QWEN, the published one of that folder too."""
    made = [{"smollm2": smollm2, "qwen": qwen}[name]()]
    if folder := os.environ.get(f"IBDISTILL_CHAT_{name.upper()}"):
        made.append(tokenizers.load_tokenizer(folder, "student.tokenizer"))
    for tokenizer in made:
        student = tiny("llama")
        prompt = Prompt.of(student, tokenizer, Config())
        if name == "qwen":
            with pytest.raises(ValueError, match="the tokenizer joins the question's last character and"):
                export.chat_template(student, tokenizer, prompt)
        else:
            assert export.chat_template(student, tokenizer, prompt)


@pytest.mark.parametrize(
    ("model_type", "bos"),
    [("t5", False), ("llama", False), ("llama", True), ("qwen2", False), ("gpt2", True)],
)
def test_the_lines_on_the_card_give_the_answers_of_the_evaluation(tmp_path, model_type, bos):
    name = save(tmp_path / "pretrained", model_type, bos=bos)
    settings = {"min_length": 9, "repetition_penalty": 5.0, "num_beams": 3, "do_sample": True}
    Path(f"{name}/generation_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    limits = {"max_question_tokens": 24, "max_label_tokens": 5, "max_rationale_tokens": 12}
    config = Config(data=DataConfig(task="svamp", **limits), student=StudentConfig(model=name, lora_rank=2))
    student = load_student(config.student, tokenizer, 0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    export.write(student, tokenizer, tmp_path / "out", config, {"svamp": {"accuracy": 0.5}})
    expected = [
        [
            answer.text
            for answer in decoding.decode(
                student,
                tokenizer,
                [f"{stream}: {question}" for question in TEXTS[:3] + QUESTIONS],
                max_question_tokens=24,
                max_new_tokens=limit,
                device=torch.device("cpu"),
            )
        ]
        for stream, limit in (("predict", 5), ("explain", 12))
    ]
    assert all(len(set(texts)) > 2 for texts in expected)
    said = answers_by_card(tmp_path / "out", TEXTS[:3] + QUESTIONS)
    assert said == list(zip(*expected, strict=True))

    generation = GenerationConfig.from_pretrained(tmp_path / "out").to_diff_dict()
    generation.pop("transformers_version")
    ids = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("bos", "eos", "pad")}
    ids |= {"decoder_start_token_id": 0} if model_type == "t5" else {}
    expected = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12} | ids
    assert generation == {key: value for key, value in expected.items() if value is not None}


def test_the_card_tells_its_origin_and_no_path(tmp_path):
    name = save(tmp_path / "secret" / "tiny", "llama")
    Path(f"{name}/README.md").write_text("---\nlicense: mit\nbase_model: org/origin\n---\nHello --- there\n")
    data = DataConfig(task=["svamp", "demo"], path=str(tmp_path / "secret"))
    config = Config(student=StudentConfig(model=name, lora_rank=4), data=data)
    config.run.dir, config.run.seed = str(tmp_path / "run"), 3
    export.write(tiny("llama"), padded(), tmp_path / "out", config)
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card and "/" + "tmp" not in card
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["license"], head["library_name"]) == (
        "org/origin",
        "mit",
        "transformers",
    )
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert settings == {
        "run": {"seed": 3},
        "data": {"task": ["svamp", "demo"], "path": "secret"},
        "student": {"model": "tiny", "lora_rank": 4},
    }
    assert "on the task svamp, demo" in card
    for base, public in (
        ("/home/me/tiny", None),
        ("./tiny", None),
        (str(tmp_path / "secret"), None),
        (["org/one", "../two"], ["org/one"]),
    ):
        head = yaml.safe_dump({"license": "mit", "base_model": base})
        Path(f"{name}/README.md").write_text(f"---\n{head}---\n")
        assert card_head.front_matter(config).get("base_model") == public
    config.teacher = TeacherConfig(
        placement="server", server_urls=["http://me:word@10.0.0.1:8000/v1"], server_model="org/teacher"
    )
    own = model_card._settings(config)["teacher"]
    assert own == {"placement": "server", "server_model": "org/teacher"}
    config.student = StudentConfig(model="org/name")
    assert card_head.front_matter(config)["base_model"] == "org/name"
    config.student = StudentConfig(model="org/name", init="random")
    assert "base_model" not in card_head.front_matter(config)
    assert "base_model" not in card_head.front_matter(Config())
