"""What the ranks of a run write to the console."""

from __future__ import annotations

import logging
import warnings

from ibdistill.runtime import startup

logger = logging.getLogger("ibdistill")


class _Formatter(logging.Formatter):
    """Escapes what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return startup.for_terminal(super().format(record))


def start_logging(rank: int) -> None:
    """Rank 0 logs everything; the other ranks only log warnings, with their rank in front."""
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _hide_loading_bars()
    # DeepSpeed still calls deprecated names of torch, about which a user can do nothing
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def _hide_loading_bars() -> None:
    """Keep transformers' bars for loading weights out of the console; the hub's bars for downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # it switches the hub's off too
    if hub:
        enable_progress_bars()
