"""The states of rows below the first thing that learns: computed once, and shared by all runs that need them.

They are computed without dropout, in batches that follow from the rows alone, so that their numbers are the same
whichever run computes them, and a run that goes on has those that it had. The name of their file is a hash of all that
decides about them: the trunk's numbers and configuration, the rows, the number format, the versions of the libraries
and what computes. Where starting from them would change anything, the model computes as if they were not there; and
where several processes train together, which share the work anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from smidgen import __version__
from smidgen.errors import UserError
from smidgen.layers import is_causal, is_sharded
from smidgen.modes import chance_kept, evaluating
from smidgen.process.batches import by_length, collate
from smidgen.process.encoding import Encoded
from smidgen.process.models import autocast
from smidgen.process.onednn import exact_onednn, pays
from smidgen.process.parallel import this_process
from smidgen.process.run_recipe import TrainingConfig
from smidgen.process.shelf import Asked, Shelf, StoppedError
from smidgen.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.adapter import Adapter

ROWS = 32
"""Rows that are computed at once; the same in all runs, because it decides about the last bits."""

TRIED = 4
"""Rows, from the shortest to the longest, on which a trunk is tried."""


class FrozenStates:
    """Lets a model that an adapter is on start from kept states, for the rows that have them.

    Args:
        model: on its device.
        adapter: on it; what learns of it may change.
        training: its `frozen_states` says what is kept, its `frozen_dropout` whether the trunk drops out.
        pad_id: fills short rows.
        shelf: where they are kept.

    Attributes:
        stopped: whether to give up what is computed; asked now and then.
        note: why some rows were not kept, in a sentence.
        depth: the most blocks that were not computed for the rows that are learned from.
    """

    note: str | None = None
    depth: int = 0

    def __init__(
        self, model: PreTrainedModel, adapter: Adapter, training: TrainingConfig, pad_id: int, shelf: Shelf
    ) -> None:
        self.model, self.adapter, self.training, self.pad_id, self.shelf = model, adapter, training, pad_id, shelf
        self._learning: list[bool] | None = None
        self._trunk: Trunk | None = None
        self._is_exact, self._is_steady = False, False
        self._like = torch.empty(0)
        self.stopped: Asked = lambda: False
        self._rows: Sequence[Encoded] = ()  # that are learned from
        self._refused: set[bytes] = set()

    def keep(self, rows: Sequence[Encoded]) -> None:
        """Compute the states of rows that the model will learn from or, in evaluation mode, be scored on, often."""
        if not rows or not self._is_wanted:
            return
        if self.model.training:
            self._rows = rows
        self._follow(rows)
        self._keep(rows)

    def given(self, rows: Sequence[Encoded]) -> contextlib.AbstractContextManager[None]:
        """Inside, the model starts from the states of these rows, `collate`d on the right, if all of them are kept."""
        if self._follow(rows) and self._rows:
            self._keep(self._rows)  # as a run would that goes on from here
        keys = [_key(row) for row in rows]
        if not self._serves() or not all(key in self.shelf for key in keys):
            return contextlib.nullcontext()
        assert self._trunk is not None
        longest = max(len(row.input_ids) for row in rows)
        states = torch.zeros(len(rows), longest, self._like.shape[-1], dtype=self._stored)
        for row, key, into in zip(rows, keys, states, strict=True):
            self.shelf.read(key, into[: len(row.input_ids)].view(torch.uint8).numpy())
        return self._trunk.given(states.to(self._like.device, self._like.dtype))

    @property
    def noisy_depth(self) -> int:
        """How many blocks must be computed anew only because they drop out."""
        if self._trunk is None or self.training.frozen_states == "off":
            return 0
        return self._trunk.depth if self._is_exact and not self._is_steady else 0

    def close(self) -> None:
        """Let go of the files."""
        self.shelf.close()

    def _serves(self) -> bool:
        """Whether states may take the place of the trunk in the mode that the model is in."""
        allowed = self._is_wanted and self._trunk is not None and self._is_exact
        return allowed and (self._is_steady or not self.model.training)

    @property
    def _is_wanted(self) -> bool:
        several = self.training.epochs > 1 and this_process().num_processes == 1
        return several and self.training.frozen_states != "off"

    def _keep(self, rows: Sequence[Encoded]) -> None:
        if not self._serves():
            return
        keys = {_key(row): row for row in rows}
        missing = {key: row for key, row in keys.items() if key not in self.shelf and key not in self._refused}
        if missing:  # what they come from takes a hash of all frozen weights
            width = self._like.shape[-1] * self._stored.itemsize
            sizes = {key: len(row.input_ids) * width for key, row in missing.items()}
            with contextlib.suppress(StoppedError):
                refusal = self.shelf.put(self._origin(), sizes, self._computed(missing), stopped=self.stopped)
                if refusal is not None:
                    self.note = refusal
                    self._refused.update(missing)
        if self.model.training and self._trunk is not None and all(key in self.shelf for key in keys):
            self.depth = max(self.depth, self._trunk.depth)

    def _follow(self, rows: Sequence[Encoded]) -> bool:
        """Look where the trunk ends if something else learns than before, and keep it from dropping out.

        Returns:
            Whether something else learns, so that no states are kept.

        Raises:
            UserError: the trunk is not to drop out, and each process has a part of the model.
        """
        if not self._is_wanted and self.training.frozen_dropout:
            return False
        if is_sharded(self.model):
            raise UserError("training.frozen_dropout=false is not for a model that processes share. Leave it out.")
        learning = [parameter.requires_grad for parameter in self.adapter.parameters()]
        is_new = learning != self._learning
        if is_new:
            self._learning = learning
            if self.model.training:
                self.model.train()  # what was in a deeper trunk may have been kept from dropping out
            self._find(self._rows or rows)
        self._quieten()
        return is_new

    def _quieten(self) -> None:
        if self.model.training and self._trunk is not None and not self.training.frozen_dropout:
            self._trunk.eval()

    def _find(self, rows: Sequence[Encoded]) -> None:
        """Find the trunk, and try it on a few of the rows."""
        by_size = sorted(rows, key=lambda row: len(row.input_ids))
        places = np.linspace(0, len(by_size) - 1, min(TRIED, len(by_size))).round().astype(int)
        tried = self._inputs([by_size[place] for place in places])
        self.shelf.close()
        self._refused.clear()
        with self._computing(), evaluating(self.model):
            self._trunk = Trunk.of(self.model, self._inputs(by_size[:1]))
            if self._trunk is not None:
                states = self._trunk.states(tried)
                self._like = states.new_empty(states.shape[-1])
                self._is_exact = self._trunk.is_exact(tried)
                self.model.train()
                self._quieten()
                self._is_steady = not self._trunk.leaves_out() and self._is_repeatable(tried)

    def _is_repeatable(self, inputs: dict[str, Any]) -> bool:
        """Whether chance has no part in the states in the mode that the model is in, as it has in a router's noise."""
        assert self._trunk is not None
        found = []
        for seed in range(2):
            with chance_kept(self.model):
                torch.manual_seed(seed)
                found.append(self._trunk.states(inputs))
        return bool(torch.equal(*found))

    def _computed(self, rows: Mapping[bytes, Encoded]) -> Iterator[tuple[bytes, memoryview]]:
        """The states of each row, as bytes."""
        assert self._trunk is not None
        keys = list(rows)
        with evaluating(self.model):
            for batch in by_length([len(rows[key].input_ids) for key in keys], ROWS):
                if self.stopped():
                    raise StoppedError
                with self._computing():
                    states = self._trunk.states(self._inputs([rows[keys[place]] for place in batch]))
                for place, found in zip(batch, states.to("cpu", self._stored), strict=True):
                    own = found[: len(rows[keys[place]].input_ids)]
                    yield keys[place], memoryview(own.contiguous().view(torch.uint8).numpy())

    @property
    def _stored(self) -> torch.dtype:
        return torch.bfloat16 if self.training.frozen_states == "bf16" else self._like.dtype

    def _inputs(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        tensors = collate(rows, self.pad_id)
        inputs: dict[str, Any] = {name: tensors[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return inputs | ({"use_cache": False} if is_causal(self.model) else {})

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with exact_onednn(self.model.device), autocast(self.model, self.training.precision):
            yield

    def _origin(self) -> str:
        """All that decides about the states of a row, but for the rows that are computed with it."""
        assert self._trunk is not None
        device = self.model.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        versions = f"smidgen {__version__} torch {torch.__version__} transformers {transformers.__version__}"
        kernels = f"{self.model.config._attn_implementation} {device.type} {where} {pays() and 'oneDNN'}"
        return f"{self._trunk.fingerprint()} {self._stored} {self.training.precision} {versions} {kernels}"


def _key(row: Encoded) -> bytes:
    """What a row is found by: a hash of its tokens."""
    return hashlib.blake2b(np.asarray(row.input_ids, np.int64).tobytes(), digest_size=16).digest()
