"""Students: loading, adapting, one forward for both streams, and getting the whole model back.

`families` loads the models themselves.

The head loss works on packed hidden states, so a model's forward here ends before the head:
`states` gives the decoder's states at the real target positions of each stream.
An encoder-decoder's streams share one encoder call; the decoder runs once a stream, because a
label is a few tokens long and a rationale a hundred, and padding one to the other would cost
more than a second call. A decoder-only model, whose rows hold the question too, runs once for
both. All of it happens within one `engine(...)`, so ZeRO-3 sees the same sequence of modules
each step and its prefetch trace completes (a forward of its own for each stream, as the
reference has it, would not).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig, StudentConfig
from ibdistill.data.batches import Batch
from ibdistill.models import presets
from ibdistill.models.families import ENCODER_DECODER, family, load_model, load_preset

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)


def load_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """A tokenizer by hub name or folder. `setting` is named in the ValueError if there is none.

    One without a padding token (GPT-2, Llama) pads with its end token. Masks and positions here
    come from lengths, never from ids, so a padding token is nowhere mistaken for an end.
    """
    # transformers makes an empty tokenizer from a folder that holds a model's config only
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(
            f"{setting} is {name!r}, which holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}; "
            "save one there with tokenizer.save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting} is {name!r}, which holds no tokenizer: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_student(config: StudentConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The student as `config` describes it, whole and in fp32, on the CPU.

    Raises ValueError if there is no such model, if its family is not supported, or if the
    tokenizer does not fit it.
    """
    if config.model in presets.PRESETS:
        model = load_preset(config.model, tokenizer, seed, config.dropout)
    else:
        model = load_model(
            config.model,
            tokenizer,
            setting="student.model",
            dropout=config.dropout,
            random_seed=seed if config.init == "random" else None,
        )
    check_fit(model, tokenizer)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.lora_rank:
        model = with_lora(model, config)
    if config.compile:
        if family(model) == ENCODER_DECODER:
            model.get_encoder().compile(dynamic=True)
        model.get_decoder().compile(dynamic=True)
    return model.train()  # from_pretrained leaves it in evaluation mode, without dropout


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token id has a row and the special tokens agree.

    A decoder-only model may end with another token than it was pretrained with: base models
    are trained with the tokenizers of their instructed versions.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"student.tokenizer has {len(tokenizer)} tokens but student.model only {rows} embedding rows; "
            "take the model's own tokenizer (leave student.tokenizer empty) or a model of that vocabulary"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("student.tokenizer has no end-of-sequence token, with which every target ends")
    for name in ("pad_token_id", "eos_token_id") if family(model) == ENCODER_DECODER else ():
        theirs, ours = getattr(model.config, name), getattr(tokenizer, name)
        if theirs != ours:
            raise ValueError(
                f"student.tokenizer has {name} {ours} but student.model has {theirs}; "
                "they were not made for each other"
            )


def check_context(model: PreTrainedModel, config: DataConfig) -> None:
    """Raise ValueError if the longest question and target do not fit a decoder-only model's positions."""
    if family(model) == ENCODER_DECODER:
        return  # relative positions
    have = model.config.max_position_embeddings
    target = max(config.max_label_tokens, config.max_rationale_tokens)
    need = 1 + config.max_question_tokens + target  # with BOS
    if need > have:
        raise ValueError(
            f"student.model has {have} positions, but data.max_question_tokens {config.max_question_tokens} "
            f"with up to {target} target tokens and BOS need {need}; lower data.max_question_tokens to "
            f"{have - target - 1}, or data.max_rationale_tokens"
        )


def check_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
) -> int:
    """The number of head rows, counted from 0, that mean the same in student and teacher.

    Rows beyond the tokenizer are padding, and models of one family often differ in it (T5:
    32100 and 32128, Qwen: 151936 and 152064). Text is tokenized once, by the student's
    tokenizer, so only what an id stands for has to agree, not how text is split.

    Raises ValueError if an id stands for different tokens, if a tokenizer has more tokens than
    both models have rows, or if targets would end differently.
    """
    ways_out = (
        "Choose a teacher of the student's vocabulary, or distil through the teacher's text: "
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
            "student not to end; give the teacher's tokenizer as student.tokenizer"
        )
    return shared


def with_lora(model: PreTrainedModel, config: StudentConfig) -> nn.Module:
    """The model with adapters as `config` describes them. Raises ValueError for layers that it hasn't."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if family(model) == ENCODER_DECODER else "CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_targets or None,
        lora_dropout=0.0,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"student.lora_targets is {config.lora_targets}: {error}") from error


@dataclass(frozen=True)
class States:
    """What a model says about a batch, before its head."""

    targets: dict[str, Tensor]
    """Stream -> [N_stream, D] final hidden states at the packed target positions, ready for the head;
    empty if they were not asked for."""
    questions: Tensor
    """[N_question, D] states of the predict stream's question tokens."""
    bottleneck: tuple[Tensor, ...] = ()
    """What a bottleneck returned besides the states."""


def states(
    model: nn.Module, batch: Batch, *, targets: bool = True, bottleneck: nn.Module | None = None
) -> States:
    """One forward of both streams, without the head. Without `targets` only what the questions need.

    `bottleneck`, for an encoder-decoder model, stands between the two: called with the encoder's states
    [S * B, L, D] and their mask it returns what the decoder is to see in their place, and more.

    Padded positions come last in their row, so under the causal mask no real position sees
    them: a decoder needs no mask of its own, and positions count from the row's start.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    batch = batch if targets else questions_only(batch)
    if family(base) == ENCODER_DECODER:
        return _encoder_decoder(base, batch, bottleneck)
    return _decoder_only(base, batch)


def questions_only(batch: Batch) -> Batch:
    """The rows of the predict stream, which are the first, and no target positions."""
    rows = len(batch.input_ids) // len(batch.positions)
    return replace(
        batch,
        input_ids=batch.input_ids[:rows],
        attention_mask=batch.attention_mask[:rows],
        decoder_input_ids={},
        positions={},
    )


def _encoder_decoder(model: PreTrainedModel, batch: Batch, bottleneck: nn.Module | None) -> States:
    ids = [batch.input_ids, *batch.decoder_input_ids.values()]
    # one lookup: the gradient of each is as large as the table
    embedded = model.get_input_embeddings()(torch.cat([part.flatten() for part in ids]))
    questions, *rest = (
        rows.unflatten(0, part.shape)
        for rows, part in zip(embedded.split([part.numel() for part in ids]), ids, strict=True)
    )
    encoded = model.get_encoder()(inputs_embeds=questions, attention_mask=batch.attention_mask)[0]
    seen, *more = (encoded,) if bottleneck is None else bottleneck(encoded, batch.attention_mask)
    targets = {}
    for index, (stream, inputs) in enumerate(zip(batch.decoder_input_ids, rest, strict=True)):
        rows = slice(index * len(inputs), (index + 1) * len(inputs))
        decoded = model.get_decoder()(
            inputs_embeds=inputs,
            encoder_hidden_states=seen[rows],
            encoder_attention_mask=batch.attention_mask[rows],
            use_cache=False,
        )[0]
        hidden = decoded.flatten(0, 1).index_select(0, batch.positions[stream])
        # T5 with tied embeddings scales what goes into the head
        scales = getattr(model.config, "scale_decoder_outputs", False)
        targets[stream] = hidden * model.config.d_model**-0.5 if scales else hidden
    return States(targets, encoded.flatten(0, 1).index_select(0, batch.question_positions), tuple(more))


def _decoder_only(model: PreTrainedModel, batch: Batch) -> States:
    hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False)[0]
    of_stream = dict(zip(batch.positions, hidden.chunk(len(batch.positions) or 1), strict=False))
    targets = {
        stream: rows.flatten(0, 1).index_select(0, batch.positions[stream])
        for stream, rows in of_stream.items()
    }
    return States(targets, hidden.flatten(0, 1).index_select(0, batch.question_positions))


class WholeModel:
    """Gives the trained model in one piece, for decoding and export, whatever ZeRO does to it.

    Under ZeRO-3 every rank collects a copy, one parameter at a time, and drops it afterwards.
    That takes one more student in memory while evaluating, and in return decoding runs without
    an all-gather a token, ranks may decode unequal shares, and the engine's hooks and trace
    are left alone.
    """

    def __init__(self, model: nn.Module, *, sharded: bool) -> None:
        """Call before the engine partitions `model`."""
        self._model = model
        self._skeleton = _skeleton(model) if sharded else None

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The model in evaluation mode. Collective under ZeRO-3."""
        model = self._model if self._skeleton is None else self._collect()
        model.eval()
        try:
            yield model
        finally:
            self._model.train()

    def _collect(self) -> nn.Module:
        model = copy.deepcopy(self._skeleton)
        state = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().clone()
        # tied weights: one tensor under several names
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            state[name] = state[first.setdefault(id(parameter), name)]
        model.load_state_dict(state, strict=False, assign=True)
        # the skeleton's buffers, such as rotary frequencies, stayed where the model was made
        return model.to(state[name].device)


def _skeleton(model: nn.Module) -> nn.Module:
    """The model's structure and buffers without its weights."""
    weights = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo=weights)
