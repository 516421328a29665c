"""Students that begin as evenly spaced layers of a pretrained model (`student.layers`).

Of L layers, N >= 2 keep those with the numbers round(i (L - 1) / (N - 1)), i = 0 ... N - 1, halves rounded
up: the first, the last, and between them N - 2 at even distances. N = 1 keeps the first. DistilBERT begins so
too, with every second layer of its teacher (Sanh et al., arXiv 1910.01108, section 3). An encoder-decoder
model keeps N layers of its encoder and N of its decoder.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ibdistill.config.sections import StudentConfig
from ibdistill.models.architectures import ENCODER_DECODER, family, layers_of_pair

_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Settings of a configuration that have a value for each layer."""
KEPT = "kept_layers"
"""The setting of a cut model's configuration that names its layers by their numbers in the whole one."""


def kept(of: int, layers: int) -> list[int]:
    """The numbers of the layers that stay, of `of` in all. See the module's docstring."""
    if layers == 1:
        return [0]
    return [(2 * i * (of - 1) + layers - 1) // (2 * (layers - 1)) for i in range(layers)]


def check_preset(config: StudentConfig) -> None:
    """Raise ValueError if a preset is to be cut."""
    if config.layers:
        raise ValueError(
            f"student.layers is {config.layers}, which keeps layers of a pretrained model, and student.model "
            f"is the preset {config.model!r}, whose weights are random; take a smaller preset, or a folder "
            "or hub name"
        )


def cut_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration, of a model cut to so many layers; 0: of the whole one.

    Raises ValueError if there are fewer.
    """
    if not layers:
        return config
    stacks = _stacks(config)
    if layers > min(stacks.values()):
        counts = " and ".join(f"{count} in its {name}" for name, count in stacks.items())
        raise ValueError(
            f"student.layers is {layers}, and student.model has {counts}; take as many or fewer, or 0 for all"
        )
    numbers = {name: kept(count, layers) for name, count in stacks.items()}
    ours = numbers["decoder"]
    for name in _BY_LAYER:
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[i] for i in ours])
    if hasattr(config, "max_window_layers"):  # Qwen2's: the first layers see everything
        config.max_window_layers = sum(i < config.max_window_layers for i in ours)
    if hasattr(config, "mlp_only_layers"):  # Qwen's mixtures: which layers have no experts
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        config.mlp_only_layers = [j for j, i in enumerate(ours) if i in dense or (i + 1) % step]
        config.decoder_sparse_step = 1
    for name in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "num_hidden_layers"):
        if hasattr(config, name):
            setattr(config, name, layers)
    setattr(config, KEPT, numbers)
    return config


def cut(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The same model without the other layers; 0: as it is. Raises ValueError as `cut_config` does."""
    if not layers:
        return model
    stacks = _stacks(model.config)
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }  # T5's stacks have copies
    for config in configs.values():
        cut_config(config, layers)
    for name, count in stacks.items():
        stack = model.get_encoder() if name == "encoder" else model.get_decoder()
        blocks = next(key for key, part in stack.named_children() if _holds(part, count))
        whole = getattr(stack, blocks)
        setattr(stack, blocks, nn.ModuleList([whole[i] for i in kept(count, layers)]))
        for number, block in enumerate(getattr(stack, blocks)):
            for part in block.modules():
                if hasattr(part, "layer_idx"):  # the place of its keys and values while decoding
                    part.layer_idx = number
    return model


def _stacks(config: PreTrainedConfig) -> dict[str, int]:
    """The number of layers by stack."""
    if family(config) == ENCODER_DECODER:
        return dict(zip(("encoder", "decoder"), layers_of_pair(config), strict=False))
    return {"decoder": config.num_hidden_layers}


def _holds(part: nn.Module, count: int) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) == count
