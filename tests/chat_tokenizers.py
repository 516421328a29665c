"""Small tokenizers with chat templates: cut out of published ones, with their ids, and made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as cores
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's template: only the thoughts of the last turn are shown, and an empty block of them stands in the
# prompt where thinking is off.
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set said = m.content %}"
    "{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{%- if '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- said }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
ALWAYS_THINKING = (  # as that of Qwen3's thinking models: the prompt opens the thoughts
    THINKING.partition("{%- if add_generation_prompt %}")[0]
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
SMOLLM2_TEMPLATE = (  # of SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (  # of Qwen2.5-Coder-0.5B-Instruct, without the branches for tools
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant" and not message.tool_calls) %}'
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SMOLLM2_PIECES = (
    "+ 27 . 30 / 31 3 35 4 36 7 39 < 44 = 45 > 46 ? 47 B 50 W 71 a 81 b 82 e 85 f 86 h 88 i 89 k 91 m 93 "
    "n 94 r 98 s 99 t 100 u 101 y 105 Ċ 198 Ġ 216 in 254 er 259 at 261 is 271 an 276 Ġb 278 as 292 st 302 "
    "Ġis 314 ist 363 th 373 us 376 em 391 ant 403 ri 431 Ġ= 446 ass 520 ef 721 stem 740 ink 900 hat 962 "
    "Ġ+ 1232 sy 1560 What 1780 user 4093 rief 4196 Ġbrief 5453 Be 6077 istant 9531 </ 9617 system 9690 "
    "think 17400"
)
SMOLLM2_MERGES = (
    "i n,e r,a t,i s,a n,Ġ b,a s,s t,Ġ is,is t,t h,u s,e m,an t,r i,Ġ =,as s,e f,st em,in k,h at,Ġ +,s y,"
    "W hat,us er,ri ef,Ġb rief,B e,ist ant,< /,sy stem,th ink"
)
QWEN_PIECES = (
    "+ 10 . 13 / 14 3 18 4 19 7 22 < 27 = 28 > 29 ? 30 B 33 W 54 a 64 b 65 e 68 f 69 h 71 i 72 k 74 m 76 "
    "n 77 r 81 s 82 t 83 u 84 y 88 Ċ 198 Ġ 220 in 258 er 261 at 266 st 267 ĊĊ 271 an 276 Ġ= 284 is 285 "
    "Ġb 293 as 300 em 336 th 339 us 355 Ġis 374 ist 380 ass 395 >Ċ 397 ri 461 Ġ+ 488 ant 517 </ 522 yst 597 "
    "ystem 612 .Ċ 624 ink 766 ef 823 user 872 >ĊĊ 1339 Wh 1639 Be 3430 What 3838 rief 4364 system 8948 "
    "Ġbrief 9814 istant 11202 <th 13708 think 26865 assistant 77091"
)
QWEN_MERGES = (
    "i n,e r,a t,s t,Ċ Ċ,a n,Ġ =,i s,Ġ b,a s,e m,t h,u s,Ġ is,i st,as s,> Ċ,r i,Ġ +,an t,< /,y st,yst em,"
    ". Ċ,in k,e f,us er,> ĊĊ,W h,B e,Wh at,ri ef,s ystem,Ġb rief,ist ant,< th,th ink,ass istant"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def smollm2() -> PreTrainedTokenizerFast:
    """The pieces of SmolLM2's tokenizer that the golden conversation needs, under their ids."""
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _cut_out(SMOLLM2_PIECES, SMOLLM2_MERGES, special, split, SMOLLM2_TEMPLATE, bos="<|im_start|>")


def qwen() -> PreTrainedTokenizerFast:
    """The same of Qwen2.5's tokenizer."""
    special = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _cut_out(QWEN_PIECES, QWEN_MERGES, special, split, QWEN_TEMPLATE, bos="<|endoftext|>")


def _cut_out(pieces, merges, special, split, template, bos) -> PreTrainedTokenizerFast:
    words = pieces.split()
    vocabulary = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    pairs = [tuple(pair.split()) for pair in merges.split(",")]
    core = Tokenizer(cores.BPE(vocabulary | special, pairs))
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def chatml(template: str = CHATML, **overrides) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of the tiny models with the tokens of ChatML and a template; its own end token
    is another one than a turn's end."""
    tokenizer = byte_tokenizer(**overrides)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, model_type: str = "llama", template: str = CHATML, **overrides) -> str:
    """A tiny model with `chatml`'s tokenizer, for `from_pretrained`; the folder's name."""
    import torch
    from tiny_models import config_of
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512} | overrides
    AutoModelForCausalLM.from_config(config_of(model_type, **size)).save_pretrained(folder)
    chatml(template).save_pretrained(folder)
    return str(folder)


def talks_folder(folder: Path) -> str:
    """A JSONL task of 12 conversations, of one turn or of two; the folder's name."""
    rows = []
    for i in range(12):
        a, b = i % 4 + 1, i % 3 + 2
        talk = [
            {"role": "user", "content": f"{a} + {b} ?"},
            {"role": "assistant", "content": str(a + b), "reasoning_content": f"start {a} . found {b} ."},
            {"role": "user", "content": "+ 1 ?"},
            {"role": "assistant", "content": f"<think>\nfound 1 .\n</think>\n\n{a + b + 1}"},
        ]
        rows.append({"messages": talk[: 2 + 2 * (i % 2)]})
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def data_rows(folder: Path) -> str:
    """A JSONL task of four sums with rationales, the same in every split; the folder's name."""
    rows = [
        {"question": f"{a} + {b} ?", "rationale": f"start {a} . found means + {b} .", "label": str(a + b)}
        for a, b in ((3, 4), (1, 1), (5, 4), (2, 6))
    ]
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
