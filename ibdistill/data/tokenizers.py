"""Tokenizers made here: a sentencepiece model trained on a corpus, and the demo's word list.

Both come out as `T5Tokenizer`, so everything downstream (saving, `AutoTokenizer`, the
export of a student) treats them like a tokenizer from the hub.

Text is not normalised (no NFKC): what was written is what comes back. Like T5's own, the
tokenizer splits at whitespace first, so a line break or a run of spaces reads as one space.
A character that the training text never showed becomes `<unk>`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ibdistill.data.tasks import demo

if TYPE_CHECKING:
    from transformers import T5Tokenizer

SENTINELS = 100
_SPECIAL = re.compile(r"<extra_id_\d+>|<pad>|</s>|<unk>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark for a space


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> T5Tokenizer:
    """Train a unigram model, save it to `folder` and return it.

    `vocab_size` counts pieces and the three special ones; fewer come out where the text does
    not support as many. 100 sentinels follow. One thread and no sampling: the same texts in
    the same order give the same pieces. `folder` also gets sentencepiece's own `spiece.model`.

    Raises:
        ValueError: no text, or `vocab_size` below the number of different characters.
    """
    import sentencepiece

    lines = [line for text in texts if (line := " ".join(_SPECIAL.sub(" ", text).split()))]
    if not lines:
        raise ValueError("there is no text to train a tokenizer on: the training split is empty")
    longest = max(len(line.encode()) for line in lines) + 1
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            max_sentence_length=max(longest, 10),  # the trainer drops longer ones, and wants 10
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of student.vocab_size {vocab_size} can be trained: {error}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    tokenizer = _t5_tokenizer(pieces, SENTINELS)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "spiece.model").write_bytes(model.getvalue())
    return tokenizer


def demo_tokenizer() -> T5Tokenizer:
    """One id per word of the demo corpus, made from the generator's word list.

    Nothing is trained, hence nothing to cache on disk or to lock between ranks. A unigram
    model would not do: its candidates are strings that at least two different words share,
    so on 256 words it stops at 248 fragments (`shel`, `ls`), however large a vocabulary is
    asked for (measured). Sentinels are words like any other here: they are part of the
    target in `demo_pretrain`, and decoding must neither skip them nor swallow their spaces.
    """
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words += [(_WORD_START + word, 0.0) for word in demo.vocabulary()]
    return _t5_tokenizer(words, sentinels=0)


def _t5_tokenizer(pieces: list[tuple[str, float]], sentinels: int) -> T5Tokenizer:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=pieces, extra_ids=sentinels)
