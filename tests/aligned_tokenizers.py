"""Tokenizers of three kinds that cut the same text differently, and folders of tiny models with them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as cores
from transformers import PreTrainedTokenizerFast

from ibdistill.data.tasks import demo

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_level(*, words: int = 160, merged: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: its merges are made from words of the demo, and from these texts."""
    core = Tokenizer(cores.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [f"{word} {word}" for word in demo.vocabulary()[:words]] * 2 + list(merged) * 9,
        trainers.BpeTrainer(
            vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def fallback(*words: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """Unigram with tokens for bytes, as Llama's sentencepiece model: a space in front of every text, white
    space as it is, and bytes for what is no word of the demo, none of `words` and no ASCII letter."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    pieces += [(chr(i), -9.0) for i in range(33, 127)] + [(_SPACE, -9.0)]
    pieces += [(_SPACE + word, -5.0) for word in [*demo.vocabulary(), *words] if len(word) > 1]
    core = Tokenizer(cores.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="</s>", **special
    )


def save_teacher(folder: Path, tokenizer: PreTrainedTokenizerFast, model_type: str = "llama") -> str:
    """A tiny model of the type with this tokenizer; the folder's name."""
    import tiny_models

    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    tiny_models.tiny(model_type, **shape, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
