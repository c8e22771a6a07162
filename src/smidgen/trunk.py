"""The frozen trunk: what stands below the first thing that learns, and so gives a text the same states in every epoch.

Autograd says where that is: the blocks whose outputs need no gradient are the trunk, whatever is tied to whatever; and
no block that holds something that learns, even if it is left out at times, as AdapterDrop leaves some out.

`states` are what comes out of the trunk for some rows. Inside `given`, the model starts from them: the trunk's blocks
do nothing, and the last of them answers with the states.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from smidgen.hooks import active_deltas
from smidgen.targets import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.delta import Delta

Inputs = Mapping[str, Any]
"""What a model is called with: `input_ids`, `attention_mask`, and what else it needs."""


class Trunk:
    """The lowest blocks of a model that has one stack of them, and all that stands before.

    Args:
        model: nothing in it is changed, except inside `given`.
        depth: how many blocks, at least 1.
        extra: what each of them returns beside its states: nothing, or a tuple of None.
        called: the modules of the model in the order of their first calls.
    """

    def __init__(
        self, model: PreTrainedModel, depth: int, extra: tuple[None, ...] | None, called: Sequence[nn.Module]
    ) -> None:
        (stack,) = blocks(model)
        found = [model.get_submodule(name) for name in stack]
        self.model, self.depth, self._extra = model, depth, extra
        self._lower, self._upper = found[:depth], found[depth:]
        inside = {module for block in self._upper for module in block.modules()}
        self._outside = [module for module in model.base_model.modules() if module not in inside]
        self._stacks = {module for module in self._outside if inside.intersection(module.modules())}
        lower = set(self._lower[-1].modules())
        end = max(place for place, module in enumerate(called) if module in lower)
        above = set(called[end + 1 :])
        self._before = [module for module in self._outside if module not in above]

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: Inputs) -> Self | None:
        """The trunk of a model as it is now; None: the first block learns, or blocks pass on more than states.

        Args:
            model: what learns in it requires a gradient.
            inputs: of a row or a few.
        """
        stacks = blocks(model)
        if len(stacks) != 1:
            return None
        found = [model.get_submodule(name) for name in stacks[0]]
        called: dict[nn.Module, None] = {}
        with torch.enable_grad(), _hooked(model.modules(), lambda module: called.setdefault(module)):
            outputs = _outputs(model, found, inputs)
        size = inputs["input_ids"].shape
        if len(outputs) < len(found) or any(_states(output).shape[:2] != size for output in outputs):
            return None  # some are not called, or pass on something else than a row for each token
        learns = [_states(output).requires_grad or _learns(block) for output, block in zip(outputs, found, strict=True)]
        depth = learns.index(True) if any(learns) else len(found)
        extra = outputs[0][1:] if isinstance(outputs[0], tuple) else None
        if not depth or any(value is not None for value in extra or ()):
            return None
        trunk = cls(model, depth, extra, list(called))
        return None if trunk._is_changed() else trunk

    def states(self, inputs: Inputs) -> Tensor:
        """What comes out of the trunk for some rows: (rows, length, hidden size).

        The whole model is called, with as little of a head as may be, since it shifts positions by a prefix.
        """
        last = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters else {}
        )
        plain = _with(self._lower, {"_compiled_call_impl": None})  # compiled or not, they are the same
        with torch.no_grad(), plain, computing(self._upper, self._passed_on):
            return _states(_outputs(self.model, self._lower[-1:], {**inputs, **last})[0])

    @contextlib.contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Inside, the model computes what stands above the trunk alone, from these states.

        Args:
            states: (rows, length, hidden size), of the rows that it is called with; anything where they are padded.
        """
        *others, last = self._lower
        with computing(others, self._passed_on), computing([last], lambda _: self._passed_on(states)):
            yield

    def is_exact(self, inputs: Inputs) -> bool:
        """Whether the model computes the same for rows, bit by bit, when it starts from their states.

        Args:
            inputs: a few rows of different lengths.
        """
        real = inputs["attention_mask"].bool()
        watched = [[*self._lower, *self._upper][-1], self.model]
        with torch.no_grad():
            whole = _outputs(self.model, watched, inputs)
            with self.given(self.states(inputs) * real[..., None]):
                given = _outputs(self.model, watched, inputs)
        pairs = (_states(whole[0]), _states(given[0])), (whole[1][0], given[1][0])
        return all(
            torch.equal(one[real], other[real]) if one.shape[:2] == real.shape else torch.equal(one, other)
            for one, other in pairs
        )

    def leaves_out(self) -> bool:
        """Whether something in the trunk leaves parts out at random now, as dropout does in training."""
        return any(
            module.training and isinstance(value, float) and value > 0 and self._is_a_chance(module, name)
            for module in self._before
            for name, value in vars(module).items()
        )

    def eval(self) -> None:
        """Let nothing in the trunk leave anything out, whatever the mode of the model."""
        for module in self._before:
            if module not in self._stacks:
                module.training = False

    def fingerprint(self) -> str:
        """SHA-256 of the configuration, the depth, how positions are shifted, and all frozen numbers below."""
        config: str = self.model.config.to_json_string(use_diff=False)
        virtual = [delta.virtual_tokens for block in self._upper for delta in _acting(block)]
        digest = hashlib.sha256(f"{type(self.model).__name__} {config} {self.depth} {virtual}".encode())
        for module in self._outside:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.requires_grad:
                    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _is_changed(self) -> bool:
        """Whether deltas that do not learn act in the trunk, which its numbers do not tell."""
        return any(not _learns(delta) for module in self._outside for delta in active_deltas(module))

    def _is_a_chance(self, module: nn.Module, name: str) -> bool:
        """Whether an attribute is the probability that something is left out; of a stack itself, that a block is."""
        if module in self._stacks:
            return "layerdrop" in name
        return "drop" in name or (name == "p" and "Dropout" in type(module).__name__)

    def _passed_on(self, states: Tensor) -> Any:
        return states if self._extra is None else (states, *self._extra)


def _outputs(model: nn.Module, watched: Sequence[nn.Module], inputs: Inputs) -> list[Any]:
    """What modules return while a model computes; nothing of those that it does not call."""
    found: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        found[module] = output

    with contextlib.ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(keep).remove)
        model(**inputs)
    return [found[module] for module in watched if module in found]


@contextlib.contextmanager
def _hooked(modules: Iterable[nn.Module], hear: Callable[[nn.Module], object]) -> Iterator[None]:
    """Inside, `hear` is told of every module that is called, before it is."""

    def tell(module: nn.Module, _: object) -> None:
        hear(module)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(tell).remove)
        yield


def _acting(module: nn.Module) -> Iterator[Delta]:
    return (delta for inner in module.modules() for delta in active_deltas(inner))


def _states(output: Any) -> Tensor:
    states = output[0] if isinstance(output, tuple) else output
    return states if isinstance(states, Tensor) else torch.empty(0)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextlib.contextmanager
def computing(modules: Sequence[nn.Module], answer: Callable[[Tensor], Any]) -> Iterator[None]:
    """Inside, modules compute `answer` of the states that they are called with; their hooks run as ever."""

    def forward(*arguments: Any, **named: Any) -> Any:
        return answer(next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor)))

    with _with(modules, {"forward": forward, "_compiled_call_impl": None}):  # a compiled block would compute its own
        yield


@contextlib.contextmanager
def _with(modules: Sequence[nn.Module], attributes: Mapping[str, Any]) -> Iterator[None]:
    """Inside, modules have these attributes of their own."""
    before = [{name: vars(module)[name] for name in attributes if name in vars(module)} for module in modules]
    try:
        for module in modules:
            vars(module).update(attributes)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in attributes:
                del vars(module)[name]
            vars(module).update(own)
