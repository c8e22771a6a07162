"""The loss of words without keeping their logits, which for one token are as many numbers as the vocabulary has words.

The logits of a few tokens are computed at a time, and with them the gradient that they give to the token's states: all
that the backward pass needs as long as the output embedding does not learn. It is the gradient that autograd computes,
with as many operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from smidgen.layers import is_sharded
from smidgen.modes import looking
from smidgen.placeholders import IGNORED
from smidgen.process.models import autocast, logits
from smidgen.trunk import computing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 1 << 24
"""Logits that are computed at a time: 64 MB in fp32."""

TRIED = 4
"""Labels on which a model is tried."""


def plain_head(model: PreTrainedModel, batch: Mapping[str, Tensor], precision: str) -> nn.Linear | None:
    """The output embedding, if the logits are its product and nothing else, and it does not learn now.

    Args:
        model: that generates.
        batch: as for `logits`; a model is tried once, on a few of its labels.
        precision: number format of the activations.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head._forward_hooks or is_sharded(model):
        return None
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    if model not in _plain:
        known = (batch["labels"] != IGNORED).flatten().nonzero()[:TRIED, 0]
        labels = torch.full_like(batch["labels"], IGNORED).flatten()
        labels[known] = batch["labels"].flatten()[known]
        few = {**batch, "labels": labels.view_as(batch["labels"])}
        with looking(model):
            expected = logits(model, few, precision)
            with computing([head], lambda states: states):
                states = logits(model, few, precision)
            if not len(states):
                return None  # nothing that could be told from
            with autocast(model, precision):
                alone = functional.linear(states, head.weight, head.bias)
            _plain[model] = torch.equal(alone, expected) and states.dim() == 2  # prompts make it three
    return head if _plain[model] else None


_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Whether the logits of a model that was tried are a plain product: some models cap or scale them."""


def word_losses(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, (tokens,), in fp32.

    Args:
        states: what the output embedding reads, (tokens, hidden size).
        weight: its, (vocabulary, hidden size); it gets no gradient.
        bias: its, (vocabulary,), or None; nor does it.
        labels: the right words, (tokens,).
    """
    losses: Tensor = _WordLosses.apply(states, weight, bias, labels)  # type: ignore[no-untyped-call]
    return losses


class _WordLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        tokens = max(1, AT_ONCE // len(weight))
        losses, gradients = [], []
        for own, words in zip(states.split(tokens), labels.split(tokens), strict=True):
            logits = functional.linear(own, weight, bias).to(torch.promote_types(own.dtype, torch.float32))
            shares = logits.log_softmax(-1)
            losses.append(-shares.gather(1, words[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                shares.exp_().scatter_add_(1, words[:, None], torch.full_like(shares[:, :1], -1.0))
                gradients.append(shares.to(weight.dtype) @ weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return (own * gradient[:, None].to(own.dtype)), None, None, None
