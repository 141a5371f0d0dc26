"""What each stage asks of its model; a plan and a run refuse the same models, with the same words.

Only what a stage touches is a reason to refuse: rows may be scored by a loss, and a model evaluated or fully tuned,
whatever its attention looks like.
"""

from __future__ import annotations

from p2d_cli.config import MineDataConfig, TrainConfig
from p2d_cli.modeling.model_files import ModelFiles, require_tokenizer
from p2d_cli.modeling.suitability import require_suitable
from p2d_cli.stages.pool_task import METHODS_WITHOUT_MODEL

METHODS_BY_LIKELIHOOD = frozenset({"loss", "ifd"})
"""Methods of mine-data that read how likely the model finds a row."""


def check_scoring(method: str, model: ModelFiles, task_model: ModelFiles | None) -> int | None:
    """Refuse a model that score-heads cannot score by this method; return how many tokens it has embeddings for.

    Args:
        method: how heads are scored.
        model: the model.
        task_model: the fine-tuned copy that it is compared with, for `pad` without rows.

    Raises:
        P2DError: see `require_suitable`.
    """
    if method in {"random", "uniform"}:
        return require_suitable(model, heads=True, weights=False)
    if task_model is not None:
        require_suitable(task_model, heads=True)
        return require_suitable(model, heads=True)
    return _require_reader(model, heads=True, attention=method == "contrast", logits=method in {"pad", "taylor"})


def check_mining(config: MineDataConfig, model: ModelFiles) -> int | None:
    """Refuse a model that cannot read the pool as the method wants it; return how many tokens it has embeddings for.

    Raises:
        P2DError: see `require_suitable`.
    """
    if config.method in METHODS_WITHOUT_MODEL or config.scores is not None:
        if config.skip_bad_rows:  # which rows it can be shown is asked of its template
            require_tokenizer(model)
        return None
    heads = config.method in {"p2d", "data-whisperer"}
    by_readout = config.method == "p2d" and config.resolved_affinity == "readout"
    logits = config.method in METHODS_BY_LIKELIHOOD or (heads and not by_readout and config.perf != "none")
    return _require_reader(model, heads=heads, attention=heads and not by_readout, logits=logits)


def check_training(config: TrainConfig, model: ModelFiles) -> int:
    """Refuse a model that cannot be trained in this scope; return how many tokens it has embeddings for.

    Raises:
        P2DError: see `require_suitable`.
    """
    return _require_reader(model, heads=config.resolved_scope != "full", logits=True)


def check_evaluation(model: ModelFiles) -> int:
    """Refuse a model that cannot predict tokens; return how many tokens it has embeddings for.

    Raises:
        P2DError: see `require_suitable`.
    """
    return _require_reader(model, logits=True)


def _require_reader(model: ModelFiles, **needs: bool) -> int:
    """Refuse a model that rows cannot be shown to, for want of a tokenizer or of what `require_suitable` asks for."""
    require_tokenizer(model)
    return require_suitable(model, **needs)
