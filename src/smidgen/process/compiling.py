"""Blocks compiled by `torch.compile`: one graph for all of a model's blocks, with their deltas in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from smidgen.errors import UserError
from smidgen.targets import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def compiled_blocks(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside, the transformer blocks are compiled at their first call, for any number of rows and tokens, if wanted.

    A block is compiled by itself, so that all blocks with the same deltas share what is compiled, and the embeddings
    and the head stay as they are.

    Raises:
        UserError: the model has no blocks, or there is no C++ compiler, which the CPU's code needs.
    """
    if not wanted:
        yield
        return
    found = [model.get_submodule(name) for stack in blocks(model) for name in stack]
    if not found:
        raise UserError(f"training.compile: {type(model).__name__} has no list of blocks. Leave it out.")
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"training.compile needs a C++ compiler, and there is no {compiler}. Install it, or leave compile out."
        )
    # else the graph of a block without deltas would be taken for one of the same class that has some, in hooks
    guarding_hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    try:
        for block in found:
            block.compile(dynamic=True)
        with guarding_hooks:
            yield
    finally:
        for block in found:
            block._compiled_call_impl = None
