"""The frozen trunk: what stands below the first thing that learns, and so gives a text the same states in every epoch.

Autograd says where that is: the blocks whose outputs need no gradient are the trunk, whatever is tied to whatever; and
no block that holds something that learns, even if it is left out at times, as AdapterDrop leaves some out.

`states` are what comes out of the trunk for some rows. Inside `given`, the model starts from them: the trunk's blocks
do nothing, and the last of them answers with the states.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from smidgen.hooks import active_deltas
from smidgen.targets import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Any]
"""What a model is called with: `input_ids`, `attention_mask`, and what else it needs."""


class Trunk:
    """The lowest blocks of a model that has one stack of them, and all that stands before.

    Args:
        model: nothing in it is changed, except inside `given`.
        depth: how many blocks, at least 1.
        extra: what each of them returns beside its states: nothing, or a tuple of None.
    """

    def __init__(self, model: PreTrainedModel, depth: int, extra: tuple[None, ...] | None) -> None:
        (stack,) = blocks(model)
        found = [model.get_submodule(name) for name in stack]
        self.model, self.depth, self._extra = model, depth, extra
        self._lower, self._upper = found[:depth], found[depth:]
        inside = {module for block in self._upper for module in block.modules()}
        self._outside = [module for module in model.base_model.modules() if module not in inside]
        self._stacks = {module for module in self._outside if inside.intersection(module.modules())}

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
        with torch.enable_grad():
            outputs = _outputs(model, found, inputs)
        learns = [_states(output).requires_grad or _learns(block) for output, block in zip(outputs, found, strict=True)]
        depth = learns.index(True) if any(learns) else len(found)
        extra = outputs[0][1:] if isinstance(outputs[0], tuple) else None
        if not depth or any(value is not None for value in extra or ()):
            return None
        trunk = cls(model, depth, extra)
        return None if trunk._is_changed() else trunk

    def states(self, inputs: Inputs) -> Tensor:
        """What comes out of the trunk for some rows: (rows, length, hidden size)."""
        with torch.no_grad(), computing(self._upper, self._passed_on):
            return _states(_outputs(self.model.base_model, self._lower[-1:], inputs)[0])

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
        with torch.no_grad():
            whole = self.model.base_model(**inputs)[0]
            with self.given(self.states(inputs)):
                return bool(torch.equal(whole, self.model.base_model(**inputs)[0]))

    def leaves_out(self) -> bool:
        """Whether something outside the upper blocks leaves parts out at random now, as dropout does in training."""
        return any(
            module.training and isinstance(value, float) and value > 0 and self._is_a_chance(module, name)
            for module in self._outside
            for name, value in vars(module).items()
        )

    def eval(self) -> None:
        """Let nothing outside the upper blocks leave anything out, whatever the mode of the model."""
        for module in self._outside:
            if module not in self._stacks:
                module.training = False

    def fingerprint(self) -> str:
        """SHA-256 of the configuration, the depth, and all frozen numbers outside the upper blocks."""
        config: str = self.model.config.to_json_string(use_diff=False)
        digest = hashlib.sha256(f"{type(self.model).__name__} {config} {self.depth}".encode())
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
    """What modules return while a model computes, each once."""
    found: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        found[module] = output

    with contextlib.ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(keep).remove)
        model(**inputs)
    return [found[module] for module in watched]


def _states(output: Any) -> Tensor:
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, Tensor)
    return states


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextlib.contextmanager
def computing(modules: Sequence[nn.Module], answer: Callable[[Tensor], Any]) -> Iterator[None]:
    """Inside, modules compute `answer` of the states that they are called with; their hooks run as ever."""

    def forward(*arguments: Any, **named: Any) -> Any:
        return answer(arguments[0] if arguments else named["hidden_states"])

    replaced = {"forward": forward, "_compiled_call_impl": None}  # a compiled block would compute its own
    before = [{name: vars(module)[name] for name in replaced if name in vars(module)} for module in modules]
    try:
        for module in modules:
            vars(module).update(replaced)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in replaced:
                del vars(module)[name]
            vars(module).update(own)
