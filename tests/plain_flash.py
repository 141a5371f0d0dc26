"""What a kernel of flash attention offers, in plain torch, so that its way through transformers is tested on a CPU.

Axes: B batch, T queries, S keys, H query heads, G key/value groups, d head_dim, n tokens of all rows.
"""

import torch


def flash_attn_func(
    query_BTHd, key_BSGd, value_BSGd, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    """Attend; under `causal` the last query sees all keys. `window_size` counts the tokens to either side."""
    if query_BTHd.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    repeats = query_BTHd.shape[2] // key_BSGd.shape[2]
    key_BSHd, value_BSHd = (one.repeat_interleave(repeats, dim=2) for one in (key_BSGd, value_BSGd))
    scaling = query_BTHd.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores_BHTS = torch.einsum("BTHd,BSHd->BHTS", query_BTHd.float(), key_BSHd.float()) * scaling
    length, keys = scores_BHTS.shape[2:]
    behind_TS = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
    hidden_TS = (behind_TS < 0) & torch.tensor(causal)
    if window_size[0] >= 0:
        hidden_TS |= behind_TS > window_size[0]
    weights_BHTS = scores_BHTS.masked_fill(hidden_TS, -torch.inf).softmax(dim=-1)
    return torch.einsum("BHTS,BSHd->BTHd", weights_BHTS, value_BSHd.float()).to(query_BTHd.dtype)


def flash_attn_varlen_func(
    query_nHd,
    key_nGd,
    value_nGd,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """Attend within each of several rows that lie one after the other; `cu_seqlens` say where."""
    parts = [
        torch.split(tensor, cu_seqlens.diff().tolist())
        for tensor, cu_seqlens in ((query_nHd, cu_seqlens_q), (key_nGd, cu_seqlens_k), (value_nGd, cu_seqlens_k))
    ]
    ROWS_AT_ONCE.append(len(parts[0]))
    alone = [
        flash_attn_func(*(one[None] for one in row), dropout_p, softmax_scale, causal, window_size)[0]
        for row in zip(*parts, strict=True)
    ]
    return torch.cat(alone)


ROWS_AT_ONCE = []
"""How many rows each call of `flash_attn_varlen_func` was given."""
