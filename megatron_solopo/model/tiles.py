"""How many tiles of tokens an MLP is computed in; without megatron-core, since options and planning ask too."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.family import Norms
from megatron_solopo.model.families.registry import family_of

AUTO = "auto"
"""The value of --mlp-tiles that leaves the number to `tiles_of`."""


def tiles_of(tiles: str, tokens: int, hidden: int) -> int:
    """Returns the number of tiles of ``tokens`` rows, at most one for each.

    ``auto`` takes tiles of as many tokens as the model is wide (ALST, arXiv 2506.13996, section 3.3.2): what a tile
    holds is then about as large as the MLP's weights, whatever the length. The number depends on shapes alone, so a
    resumed run has the same.

    Args:
        tiles: --mlp-tiles.
        tokens: rows that the matrices multiply at once, of all ranks with sequence parallelism.
    """
    return min(tokens, -(-tokens // hidden) if tiles == AUTO else int(tiles))


def check_tiles(hf_config: PretrainedConfig, config: Config) -> None:
    """Refuses --mlp-tiles for a model with experts, or with a norm of the MLP's result.

    Raises:
        UserError: it has some.
    """
    if config.model.mlp_tiles is None:
        return
    family = family_of(hf_config)
    if family.norms is not Norms.BEFORE:  # it reads in backward what a recomputed tile leaves out
        raise UserError(
            "option-conflict",
            f"--mlp-tiles: the layers of {hf_config.model_type} have a norm of the MLP's result, for which tiles are "
            "not made; leave it out, and use --recompute-granularity full",
        )
    if family.transformer_options(hf_config).get("num_moe_experts"):
        raise UserError(
            "option-conflict",
            "--mlp-tiles: the model's layers have experts, each of which computes some of the tokens already; leave it "
            "out, and use --recompute-granularity full",
        )
