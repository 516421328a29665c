"""Tokenizers: loaded from a folder or the hub, made here, and what a run asks of them.

`load_tokenizer` reads one that exists. Two are made here: a sentencepiece model trained on a corpus
(`train_tokenizer`), and the demo's word list (`demo_tokenizer`). Both come out as `T5Tokenizer`, so
everything downstream (saving, `AutoTokenizer`, the export of a student) treats them like a tokenizer from
the hub. Text is not normalised in them (no NFKC): what was written is what comes back. Like T5's own, they
split at whitespace first, so a line break or a run of spaces reads as one space. A character that the
training text never showed becomes `<unk>`.

A run asks which ids of student and teacher mean the same (`check_vocabularies`), and which tokens begin a
text and end a question (`bos_of`, `separator_of`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ibdistill.data.tasks import demo

if TYPE_CHECKING:
    from transformers import T5Tokenizer

SENTINELS = 100
"""Sentinel tokens of a tokenizer that is trained here, `<extra_id_0>` to `<extra_id_99>`, as T5 has them."""
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)
_SPECIAL = re.compile(r"<extra_id_\d+>|<pad>|</s>|<unk>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark for a space


def load_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """A tokenizer by hub name or folder. `setting` is named in the ValueError if there is none.

    A tokenizer without a padding token (GPT-2, Llama) pads with its end token. Masks and positions here
    come from lengths, never from ids, so a padding token is nowhere mistaken for an end. Reading back does
    not "clean up": that takes the spaces out of `a , b`, in a trained student's answers and in its export.
    """
    # From a folder that holds only a model's config, transformers makes an empty tokenizer.
    folder = Path(name)
    has_words = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    if folder.is_dir() and not has_words and not _reads_bytes(folder):
        raise ValueError(
            f"{setting} is {name!r}, which holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}; "
            "save one there with tokenizer.save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of a damaged file: anything
        reason = why_not_loaded(name, error)
        raise ValueError(f"{setting} is {name!r}, which holds no tokenizer: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def why_not_loaded(name: str, error: Exception) -> str:
    """Why transformers, which raised `error`, loads nothing under a name, for a message.

    Its own message for a mistyped path, that a repository's name has one `/`, says nothing to the user. For
    a damaged file in a folder it raises whatever its code happens to stumble over.
    """
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        return f"there is no such folder (seen from {Path.cwd()})"
    if isinstance(error, OSError | ValueError) and str(error):
        return str(error)
    return f"one of its files is damaged ({type(error).__name__}: {str(error)[:200]})"


def _reads_bytes(folder: Path) -> bool:
    """Whether the folder's tokenizer is ByT5's, whose tokens are bytes, so that it has no vocabulary file."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return settings["tokenizer_class"] == "ByT5Tokenizer"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> T5Tokenizer:
    """Train a unigram model, save it to `folder` and return it.

    `vocab_size` counts the pieces and the three special tokens; fewer come out where the text does
    not support as many. `SENTINELS` sentinels follow. One thread and no sampling: the same texts in
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
    """A tokenizer of these (piece, log probability), of which the first three are pad, end and unknown."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=pieces, extra_ids=sentinels)


def check_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
) -> int:
    """The number of head rows, counted from 0, that mean the same in student and teacher.

    Rows beyond the tokenizer are padding, and models of one family often differ in their number (T5:
    32100 and 32128, Qwen: 151936 and 152064). Text is tokenized once, by the student's
    tokenizer, so only what an id stands for has to agree, not how text is split.

    Raises ValueError if an id stands for different tokens, if a tokenizer has more tokens than
    both models have rows, or if targets would end differently.
    """
    ways_out = (
        "Choose a teacher of the student's vocabulary, compare them on the text (objective.alignment text), "
        "or distil through the teacher's text: "
        "let it write the rationales, and train with teacher.placement none"
    )
    sizes = (
        f"student.tokenizer has {len(student)} tokens (student.model {student_rows} rows), "
        f"the teacher's {len(teacher)} ({teacher_rows} rows)"
    )
    ours, theirs = (
        {index: text for text, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    differing = [i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i)]
    if differing:
        first = min(differing)
        if not any(i in ours and i in theirs for i in differing):
            ways_out += ". Or give the larger tokenizer as student.tokenizer, if student.model has the rows"
        shown = [repr(v[first]) if first in v else "nothing" for v in (ours, theirs)]
        raise ValueError(
            f"{sizes}, and {len(differing)} ids differ. The first is {first}: {shown[0]} for the student, "
            f"{shown[1]} for the teacher. {ways_out}"
        )
    shared = min(student_rows, teacher_rows)
    if beyond := [i for i in ours if i >= shared]:
        raise ValueError(
            f"{sizes}: {len(beyond)} tokens, from {min(beyond)}, {ours[min(beyond)]!r}, on, are not among "
            f"the {shared} shared rows. {ways_out}"
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise ValueError(
            f"student.tokenizer ends a text with {student.eos_token!r} ({student.eos_token_id}), the "
            f"teacher's with {teacher.eos_token!r} ({teacher.eos_token_id}), so the teacher would teach the "
            "student not to end; give the teacher's tokenizer as student.tokenizer, or compare them on the "
            "text (objective.alignment text)"
        )
    return shared


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the tokenizer by itself puts in front of a text, or None.

    Raises ValueError if it puts several there, which no supported type of model does.
    """
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    lead = next((whole[:i] for i in starts if whole[i : i + len(bare)] == bare), [])
    if len(lead) > 1:
        raise ValueError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(lead)} in front of a text, and only one "
            "token is supported; take a tokenizer that puts one or none there"
        )
    return lead[0] if lead else None


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between question and target in a decoder-only model's row: newline, else the end token."""
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    return ids[-1] if ids and tokenizer.decode(ids[-1:]) == "\n" else tokenizer.eos_token_id
