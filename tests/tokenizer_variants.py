"""Tokenizers of the ways in which published ones differ: what they add, cut, normalise and clean up."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as cores
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ibdistill.data import tokenizers

_SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def t5(
    folder: Path, *, characters: str = "", template: str = "$A </s>", nfkc: bool = False, **config
) -> PreTrainedTokenizerBase:
    """A T5-like unigram tokenizer, loaded from a folder. It has `a` to `z`, digits, some signs, and
    `characters`; not `{`, `}`, `<`, `>`. `template` is its post-processor's, empty: none."""
    known = "abcdefghijklmnopqrstuvwxyz0123456789:.,?+/" + characters
    pieces = [*_SPECIAL, _SPACE, *known, *(_SPACE + letter for letter in known)]
    core = Tokenizer(
        cores.Unigram([(piece, 0.0 if piece in _SPECIAL else -2.0) for piece in pieces], unk_id=2)
    )
    core.add_special_tokens(_SPECIAL)
    core.normalizer = normalizers.NFKC() if nfkc else None
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE)]
    )
    core.decoder = decoders.Metaspace(_SPACE)
    if template:
        special = [("<s>", 3), ("</s>", 1)]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return _saved(core, folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **config)


def llama(folder: Path, *, bos: bool = True, eos: bool = False, **config) -> PreTrainedTokenizerBase:
    """A Llama-3-like byte-level tokenizer whose post-processor adds BOS, an end token, both or neither."""
    special = ["<|bos|>", "<|end|>", "<|user|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(cores.BPE({piece: i for i, piece in enumerate(vocabulary)}, []))
    core.add_special_tokens(special)
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "<|bos|> " * bos + "$A" + " <|end|>" * eos
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|bos|>", 0), ("<|end|>", 1)]
    )
    return _saved(core, folder, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|end|>", **config)


def _saved(core: Tokenizer, folder: Path, **config) -> PreTrainedTokenizerBase:
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tokenizers.load_tokenizer(str(folder), "student.tokenizer")
