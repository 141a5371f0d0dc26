"""Merging an adapter into its base model, and seeing that the result answers as the adapter does.

Legend: n probed tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from p2d_cli.errors import ArtifactError, NonFiniteError, first_line, is_out_of_memory
from p2d_cli.modeling.head_adapter import known_warnings_silenced
from p2d_cli.modeling.loading import input_device

PROBED_TOKENS = 16
TOLERANCE = 1e-3
"""By how much logits may differ, as a share of the largest, for float32 sums in another order."""
_EMBEDDINGS_AT_ONCE = 4096


def merge(model: Any) -> Any:
    """Add an adapter's change to the weights of its base model; the PeftModel is used up.

    The change is rounded to the weights' dtype: merge into an fp32 base where bfloat16 would lose small changes.
    Where the embeddings are tied to the output layer and the adapter changes one of them, they part: the output layer
    gets weights of its own, and the config says so.

    Returns:
        The plain model. With a head adapter, weights outside of the trained rows are bit-identical to the base.

    Raises:
        NonFiniteError: a merged weight is not finite.
        ArtifactError: PEFT cannot merge an adapter of this kind.
    """
    base = model.get_base_model()
    _refuse_shared(base)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    parted = False
    # Tied embeddings of which the adapter changes one part before it is merged.
    if None not in ends and any(_original(module) is not module for module in ends):
        inputs, outputs = (_original(module) for module in ends)
        if parted := inputs.weight is outputs.weight:
            outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)
    try:
        with known_warnings_silenced():
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError) as problem:
        if is_out_of_memory(problem):
            raise
        if isinstance(problem, ValueError) and "NaN" in str(problem):
            raise NonFiniteError(
                f"merging the adapter failed: {problem}",
                hint="the adapter holds values that are not finite: train it again",
            ) from problem
        raise ArtifactError(
            f"PEFT cannot merge this adapter: {first_line(problem)}", hint="serve it as an adapter, without p2d export"
        ) from problem
    if parted:
        # They are shared again if they came out equal.
        inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
        is_tied = torch.equal(inputs.weight, outputs.weight)
        if is_tied:
            outputs.weight = inputs.weight
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = is_tied
    return merged


def _refuse_shared(base: Any) -> None:
    """Refuse an adapter that changes one weight in several layers, each in its own way (Zamba2)."""
    owners: dict[int, str] = {}
    for name, module in base.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        owner = owners.setdefault(id(getattr(_original(module), "weight", module)), name)
        if owner != name:
            raise ArtifactError(
                f"merging the adapter: {owner} and {name} share a weight, and the adapter changes it in each of them in"
                " another way",
                hint="serve it as an adapter, without p2d export",
            )


def _original(module: Any) -> Any:
    """Return the base model's own layer inside what PEFT has put around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


@torch.no_grad()
def probe_tokens(model: Any) -> torch.Tensor:
    """Choose token ids `[1, n]` to compare answers on: spread over the vocabulary, and half of them ones whose
    embeddings the PeftModel changes most, if it changes any.
    """
    embeddings = model.get_base_model().get_input_embeddings()
    original_VD = _original(embeddings).weight
    count = min(PROBED_TOKENS, len(original_VD))
    ids_n = torch.arange(count) * len(original_VD) // count
    if _original(embeddings) is not embeddings:
        scale = getattr(_original(embeddings), "embed_scale", 1.0)
        parts = torch.split(torch.arange(len(original_VD), device=original_VD.device), _EMBEDDINGS_AT_ONCE)
        changes = [(embeddings(ids[None])[0] - scale * original_VD[ids]).abs().amax(dim=1) for ids in parts]
        changes_V = torch.cat(changes).cpu()
        most = changes_V.topk(count // 2).indices
        changed = most[changes_V[most] > 0]
        ids_n[: len(changed)] = changed
    return ids_n[None]


@torch.no_grad()
def answer(model: Any, ids_1n: torch.Tensor) -> torch.Tensor:
    """Return the logits `[n, V]` of one short forward pass, float32 on the CPU."""
    logits: torch.Tensor = model(input_ids=ids_1n.to(input_device(model)), use_cache=False).logits
    return logits[0].float().cpu()


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round what is saved of a float32 model to `dtype`, in place, so that it computes in float32 what is written.

    `model.to(dtype)` would also round what is not saved, such as the frequencies of rotary embeddings.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def require_same_answers(found_nV: torch.Tensor, expected_nV: torch.Tensor, doing: str) -> None:
    """Refuse logits in float32 that differ from the expected ones by more than sums in another order do.

    Raises:
        ArtifactError: that what was done (`doing`) changes the model's answers.
    """
    allowed = TOLERANCE * float(expected_nV.abs().max())
    if found_nV.shape != expected_nV.shape:
        difference = f"it has {found_nV.shape[-1]} logits a token where the adapter has {expected_nV.shape[-1]}"
    elif not (found := float((found_nV - expected_nV).abs().max())) <= allowed:
        difference = f"its logits differ from the adapter's by up to {found:.3g}, expected {allowed:.3g} at most"
    else:
        return
    raise ArtifactError(
        f"{doing} gives a model that answers otherwise than the adapter: {difference}; nothing was written",
        hint="serve it as an adapter, without p2d export",
    )
