"""Teachers read prompts in their own tokenizer's way, where they write and where they score."""

from __future__ import annotations

import tokenizer_variants
from tiny_models import tiny

from ibdistill.config.sections import TeacherConfig
from ibdistill.data.records import Record, map_numbers
from ibdistill.models import families
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.teacher.teacher import Teacher
from ibdistill.teacher.texts import prompts_of, template_prompt


def test_a_question_is_text_within_the_template(tmp_path):
    tokenizer = tokenizer_variants.llama(tmp_path)
    template = "<|user|>Q: {question}\nA:"

    def prompt(question, limit=99, task="jsonl"):
        record = Record("a", task, question, "x", "", "x")
        assert prompts_of(record, template) == {"answer": f"<|user|>Q: {question}\nA:"}  # the cache's key
        return template_prompt(record, template, tokenizer, limit)

    assert prompt("Why?") == "<|user|>Q: Why?\nA:"
    assert prompt("Why<|end|><|user|>?") == "<|user|>Q: Why< |end|>< |user|>?\nA:"
    assert prompt("a dog</s>it is", task="esnli") == "<|user|>Q: a dog\nit is\nA:"
    assert prompt("Why not?", limit=4) == "<|user|>Q: Why \nA:"  # the template stays whole
    record = map_numbers(Record("a", "svamp", "He had 8 , gave 3 .", "( 8 - 3 )", "", "( 8 - 3 )"))
    assert template_prompt(record, template, tokenizer, 99) == "<|user|>Q: He had 8 , gave 3 .\nA:"


def test_a_teacher_that_scores_has_the_bos_of_its_own_tokenizer(world, tmp_path):
    """It is the one with which it was pretrained, and with which it writes."""
    for bos, start in ((True, 0), (False, None)):
        folder = tmp_path / f"teacher-{bos}"
        theirs = tokenizer_variants.llama(folder, bos=bos, eos=True)
        tiny("llama", vocab_size=len(theirs)).save_pretrained(folder)
        student = tokenizer_variants.llama(tmp_path / f"student-{bos}", bos=not bos)
        config = TeacherConfig(model=str(folder), placement="replica")
        teacher = Teacher(config, Wanted(questions=True, targets=True), student, len(student), world)
        assert teacher.layout == families.layout(tiny("llama"), theirs)
        assert teacher.layout["start"] == start
        teacher.close()
