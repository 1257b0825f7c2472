"""In which precision score products run: what `runtime.enable_amp` says, or the machine for it."""

import logging

import torch

from projects.twhin.config import RuntimeConfig

logger = logging.getLogger(__name__)


def uses_bfloat16(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether products of scores run in bfloat16 on `device`; "auto" logs what it chose."""
    if runtime.enable_amp != "auto":
        return runtime.enable_amp
    if device.type == "cuda":
        has_fast_products = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        reason = "a GPU that has it" if has_fast_products else "a GPU without bfloat16"
    else:
        # Without tiles, bfloat16 products are made by vectors and run at half the speed of float32.
        has_fast_products = bool(torch.cpu._is_amx_tile_supported())
        reason = f"a processor {'with' if has_fast_products else 'without'} AMX tiles"
    chosen = "bfloat16" if has_fast_products else "float32"
    logger.info("enable_amp: auto: score products in %s, %s", chosen, reason)
    return has_fast_products
