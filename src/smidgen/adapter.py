"""The handle of what is on a model: `Adapter` trains, saves, disables, merges and detaches it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smidgen import attention, hooks, merging, prompts, stepping, storage
from smidgen.delta import Delta, Method, Service
from smidgen.errors import difference
from smidgen.own import OwnParameters, count, head_names, own_parameters
from smidgen.stacking import active_adapters, adapters, check_not_routed, check_order, none_active, set_active
from smidgen.targets import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter:
    """What `attach` put on a model.

    Attributes:
        model: the model.
        name: the adapter's name.
        methods: its techniques.
        places: where each technique's deltas are, a list a technique.
        sites: of what kinds these places are.
        head_names: which of the trained parameters are the task head's.
        clock: how far its training is; techniques with a schedule need `clock.steps` in loops of your own.
        lost: of one that `combine` made, the share of the combined change that its rank has no room for, as a ratio of
            Frobenius norms.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        methods: Sequence[Method],
        places: Sequence[Sequence[Place]],
        deltas: Sequence[Sequence[Delta]],
        own: Sequence[str],
    ) -> None:
        self.model, self.name, self.methods = model, name, tuple(methods)
        self.places = [list(found) for found in places]
        self.deltas = [list(built) for built in deltas]
        self.sites = frozenset(place.site for found in self.places for place in found)
        self.head_names = frozenset(head_names(model)) & frozenset(own)
        self.total = count(model)
        self._check_places()
        if not adapters(model):
            vars(model)["_smidgen_trainable"] = [n for n, p in model.named_parameters() if p.requires_grad]
        for _, parameter in own_parameters(model):
            parameter.requires_grad_(False)
        self._own = OwnParameters(model, own, keep_base=all(m.keeps_base for m in self.methods))
        model.add_module(self._own_key, self._own)
        self.service, self.lost = Service(), 0.0
        self.own_labels = self.base_labels = (model.config.id2label, model.config.label2id)
        self._frozen: list[nn.Parameter] = []  # what a user froze, while the adapter does not train
        for method, place, delta in self.entries():
            self._put(method, place, delta)
        adapters(model)[name] = self
        vars(model)["_smidgen_active"] = [name]
        try:
            self._wire()
            for _, parameter in self.named_parameters():
                parameter.requires_grad_(True)
            self.total += sum(p.numel() for n, p in self.named_parameters() if n not in self._own.names)
            self.clock = stepping.Clock()
            stepping.watch(self)
            stepping.schedule(self)
        except BaseException:
            if self._own.keep_base:
                self._own.put_base()
            vars(model)["_smidgen_active"] = []
            self._remove()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of an adapter, or one from a pickle, is watched as well."""
        vars(self).update(state)
        stepping.watch(self)

    def entries(self) -> Iterator[tuple[Method, Place, Delta]]:
        """Each delta with its technique and its place, in the order in which they act."""
        for method, found, built in zip(self.methods, self.places, self.deltas, strict=True):
            for place, delta in zip(found, built, strict=True):
                yield method, place, delta

    def _check_places(self) -> None:
        check_order(self.entries())
        taken: set[tuple[str, str]] = set()
        for method, place, _ in self.entries():
            if (method.name, place.name) in taken:
                raise ValueError(
                    f"Two {method.title} techniques of one adapter meet at {place.name}. Give them other targets."
                )
            taken.add((method.name, place.name))

    @property
    def _own_key(self) -> str:
        return f"own:{self._module_name}"

    def _key(self, method: Method) -> str:
        return f"{self._module_name}:{method.name}"

    @property
    def _module_name(self) -> str:
        return self.name.replace("%", "%25").replace(".", "%2E")  # a module's name has no dots

    def _put(self, method: Method, place: Place, delta: Delta) -> None:
        reads = delta.reads_source and place.source is not None
        source = self.model.get_submodule(place.source or "") if reads else None
        side = place.side if place.site == "layer" else None
        delta.service = self.service
        hooks.put(place.layer, self._key(method), delta, side=side, source=source)

    def _wire(self) -> None:
        """Install the attention function and the virtual tokens that the adapters on the model need, or remove them."""
        model, on = self.model, adapters(self.model)
        sites = frozenset[str]().union(*(adapter.sites for adapter in on.values()))
        (attention.install if "attention" in sites else attention.uninstall)(model)
        tokens: prompts.VirtualTokens | None = vars(model).pop("_smidgen_tokens", None)
        if tokens is not None:
            tokens.remove(model)
        if sites & {"attention", "embedding"}:
            vars(model)["_smidgen_tokens"] = tokens = prompts.VirtualTokens(model)
            tokens.prefixes = [
                next(delta for place, delta in zip(found, built, strict=True) if place.site == "attention")
                for adapter in on.values()
                for found, built in zip(adapter.places, adapter.deltas, strict=True)
                if any(place.site == "attention" for place in found)
            ]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, each parameter once: deltas as PLACE.TECHNIQUE.NAME, then the model's own by their names."""
        seen: set[int] = set()
        for method, place, delta in self.entries():
            for name, parameter in delta.named_parameters():
                if id(parameter) not in seen:  # a reparameterization is shared by all layers
                    seen.add(id(parameter))
                    yield f"{place.name}.{method.name}.{name}", parameter
        yield from self._own.own().items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, each once, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def own_names(self) -> frozenset[str]:
        """Which of the model's own parameters are trained, its head included."""
        return self._own.names

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base model's own values of the parameters that this adapter trains, where they were kept."""
        return self._own.base

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def virtual_tokens(self) -> int:
        """How many positions prompts and prefixes take from the text."""
        return sum(method.virtual_tokens for method in self.methods)

    @property
    def labels(self) -> list[str]:
        """The label names that go with it, in the head's order; the model's config has them while it is active."""
        is_last = self.active and active_adapters(self.model)[-1] is self
        names = self.model.config.id2label if is_last else self.own_labels[0]
        return [str(label) for _, label in sorted((names or {}).items())]

    @property
    def disk_bytes(self) -> int:
        """How many bytes the numbers of the saved adapter take; its description adds some kilobytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in storage.to_save(self).values())

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, and what else training goes on from, by name."""
        yield from self.named_parameters()
        for method, place, delta in self.entries():
            for name, tensor in delta.kept().items():
                yield f"{place.name}.{method.name}.{name}", tensor

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that training goes on from, reparameterizations included."""
        return {name: tensor.detach().clone() for name, tensor in self.named_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing is changed then.
        """
        tensors = dict(self.named_state())
        if tensors.keys() != state.keys():
            raise ValueError(f"The state does not fit {self!r}: {difference(tensors, state)}.")
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name} is {tuple(state[name].shape)} in the state, {tuple(tensor.shape)} in the adapter."
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])

    def _check_on_model(self) -> None:
        check_not_routed(self.model)
        if adapters(self.model).get(self.name) is not self:
            raise RuntimeError(
                f"Adapter {self.name!r} is no longer on the model: it was merged or detached. Attach or load it again."
            )

    def check_gradients(self) -> None:
        """Raise unless every delta got a gradient; call it after the first backward.

        Raises:
            RuntimeError: names the deltas without one: their layers were not called as modules, so that the model
                would have trained and answered without them.
        """
        idle = [
            f"{place.name} ({method.title})"
            for method, place, delta in self.entries()
            if any(parameter.grad is None for parameter in delta.parameters() if parameter.requires_grad)
        ]
        if all(parameter.grad is None for parameter in self.parameters()):
            raise RuntimeError(f"Nothing that adapter {self.name!r} trains has a gradient. Ask after a backward pass.")
        if idle:
            raise RuntimeError(
                f"{len(idle)} deltas of adapter {self.name!r} got no gradient: {', '.join(idle[:5])}"
                f"{', ...' if len(idle) > 5 else ''}. Their layers are never called in this model's forward, or lie "
                "below a cut in the graph. Choose other targets."
            )

    @property
    def active(self) -> bool:
        """Whether the model computes with this adapter now."""
        return self in active_adapters(self.model)

    def deactivate(self) -> None:
        """Let the model compute without this adapter, which does not train then.

        Raises:
            RuntimeError: the adapter trains the model in place and did not keep the original weights, or it is gone.
        """
        self._check_on_model()
        set_active(self.model, [adapter for adapter in active_adapters(self.model) if adapter is not self])

    def activate(self) -> None:
        """Let the model compute with this adapter alone and train it; those that were active before no longer are.

        Raises:
            RuntimeError: it is gone, or an active one cannot be deactivated.
        """
        self._check_on_model()
        set_active(self.model, [self])

    def check_base_kept(self) -> None:
        """Raise a RuntimeError if the base model's own values of what is trained are gone."""
        if not self._own.keep_base:
            raise RuntimeError(
                f"Adapter {self.name!r} did not keep the base model's weights (keep_base=False). Load the model again."
            )

    def start(self, order: int, *, trains: bool) -> None:
        """Act as the one of this number among the active ones; `stacking.set_active` calls it."""
        self._own.put_own()
        self.serve(active=True, order=order, trains=trains)

    def stop(self) -> None:
        """No longer act; `stacking.set_active` calls it."""
        self._own.put_base()
        self.serve(active=False)

    def own_slots(self) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
        """The model's modules whose parameters are trained, and those parameters by their names in the module."""
        return self._own.by_module()

    def serve(self, *, active: bool, route: hooks.Route | None = None, order: int = 0, trains: bool = True) -> None:
        """Let the deltas act, on the rows of `route` or on all, or no longer; what is trained trains while they do.

        Args:
            active: whether they act.
            route: which rows they serve; None: all.
            order: their number among the active adapters.
            trains: whether what is trained trains.
        """
        parameters, now = list(self.parameters()), self.service
        if now.active and now.trains:
            self._frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        now.active, now.trains, now.order, now.route = active, trains, order, route
        for _, _, delta in self.entries():
            if delta.training != (self.model.training and trains):
                delta.train(self.model.training)
        kept = {id(parameter) for parameter in self._frozen}
        for parameter in parameters:
            parameter.requires_grad_(active and trains and id(parameter) not in kept)
        if active and trains:
            stepping.schedule(self)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, no adapter is active: the base model's own answer, to the bit."""
        self._check_on_model()
        with none_active(self.model):
            yield

    def detach(self) -> PreTrainedModel:
        """Take the adapter off: the base model again, bit for bit."""
        self.deactivate()
        self._remove()
        return self.model

    def merge(self) -> PreTrainedModel:
        """Write the adapter into the model's weights and take it off; the model then computes the same without it.

        The update is summed in fp32 and rounded once to the weight's own format: in bfloat16 that loses small updates.

        Raises:
            ValueError: as `merging.check_mergeable`; nothing is changed then.
            RuntimeError: it is no longer on the model.
        """
        self._check_on_model()
        merging.check_mergeable(self)
        self.activate()
        merging.write(self)
        for parameter in self._own.own().values():
            parameter.requires_grad_(False)
        self._remove()
        return self.model

    def _remove(self) -> None:
        for method, place, _ in self.entries():
            hooks.remove(place.layer, self._key(method))
        del self.model._modules[self._own_key]
        del adapters(self.model)[self.name]
        stepping.forget(self)
        self._wire()
        if not adapters(self.model):
            trainable = set(vars(self.model).pop("_smidgen_trainable"))
            for key in ("_smidgen_adapters", "_smidgen_active"):
                vars(self.model).pop(key)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trainable)

    def save(
        self,
        path: str | Path,
        *,
        metrics: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Write the adapter to the folder `path`, as inference needs it (reparameterizations are folded away).

        The folder holds `adapter.json` and `adapter.safetensors`; it appears whole or not at all, and takes the place
        of one that was there.

        Args:
            path: the folder.
            metrics: scores to keep beside the weights, as JSON.
            labels: the head's label names; default: the model's own.
        """
        self._check_on_model()
        storage.save(self, Path(path), metrics or {}, labels)

    def __repr__(self) -> str:
        title = " + ".join(method.title for method in self.methods)
        places = sum(map(len, self.places))
        where = f"{places} place{'s' * (places != 1)}, " if places else ""
        share = self.trainable / self.total
        return f"{title} {self.name!r}: {where}{self.trainable:,} trainable of {self.total / 1e6:.1f} M ({share:.2%})"
