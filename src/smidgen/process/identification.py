"""Where a model has something to gain: the gradient of each linear layer, and the ranks that a budget buys there.

With the base model frozen and its new head trained for some steps, the gradient G of a layer's weight says how the loss
would fall if the layer were changed. The best change of rank r is that along G's r largest singular directions, and a
step along them lowers the loss in proportion to the sum of their squared singular values: the first step of LoRA-GA
(Wang et al., 2024, arXiv:2407.05000, section 3), and what AdaLoRA estimates while it trains. So the share of a layer is
its part of the sum of all squares; and a budget buys, again and again, the doubling of a rank that has the most of
these squares for a trained number. The first step is not the whole training: no layer gets more than twice the rank
that the budget would buy everywhere, since without a bound the ranks crowd where gradients are large, and score less
than equal ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen import targets
from smidgen.errors import UserError
from smidgen.methods import LoRA
from smidgen.process.amounts import amount
from smidgen.process.batches import WholeEpochs
from smidgen.process.encoding import Encoded, pad_id
from smidgen.process.job import Job
from smidgen.process.opening import prepare, reopen
from smidgen.process.optimizer import make_optimizer
from smidgen.process.recipe import Recipe
from smidgen.process.run_recipe import TrainingConfig
from smidgen.process.runs import check_begins_anew
from smidgen.process.technique import TechniqueSpec
from smidgen.process.train import backward
from smidgen.report.numbers import duration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.targets import Place

HEAD_STEPS = 40
"""In which a new head learns what it is for: the gradient through a random one says little."""

BATCHES = 16
"""Over which the gradient is averaged."""

LARGEST_RANK = 64

SPREAD = 2
"""How many times the rank that a budget buys everywhere a layer may have."""

FP32_BYTES = 4

RANK = 8
"""In the mean, where a budget does not say how many numbers may be trained."""


def check_gradients(recipe: Recipe) -> None:
    """Raise a UserError if the frozen weights will take no gradient."""
    if recipe.training.precision == "int8":
        raise UserError("training.precision=int8 leaves weights without a gradient to look at. Use fp32 or bf16.")


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What a linear layer has to gain.

    Attributes:
        place: its module's name.
        block: the block that it is in.
        kind: its name inside the block.
        size: trained numbers for each rank of a low-rank update.
        share: its part of the squares of all layers' gradients.
        squares: the squared singular values of its gradient, the largest first; LARGEST_RANK of them at most.
    """

    place: str
    block: str
    kind: str
    size: int
    share: float
    squares: tuple[float, ...]


Ranks = dict[str, int]
"""Of layers, by their names; 0, or not there, where nothing is trained."""


def identify(recipe: Recipe, *, run: Path | None = None) -> list[Sensitivity]:
    """The layers of a recipe's model, in their order, with what each has to gain on its data.

    Args:
        recipe: names the model and the data.
        run: the output folder of a run, with whose adapter the layers are looked at; None: the base model, with a new
            head that is trained for some steps.

    Raises:
        UserError: as `prepare`, or a layer's weight takes no gradient.
    """
    check_begins_anew(recipe)
    check_gradients(recipe)
    alone = TechniqueSpec.parse("full" if recipe.task == "generation" else "head")
    job = prepare(recipe.model_copy(update={"technique": alone})) if run is None else reopen(run)
    training = recipe.training
    rows = job.splits["train"]
    found = places_of(job.model)
    job.model.eval()
    steps = HEAD_STEPS if recipe.task != "generation" and run is None else 0
    batches = [[rows[row] for row in batch] for batch in _first_batches(rows, training, steps + BATCHES)]
    if steps:
        _train_head(job, batches[:steps])
    gradients = _gradients(job, found, batches[steps:])
    squares = {name: torch.linalg.svdvals(gradient.float()).square() for name, gradient in gradients.items()}
    whole = float(sum(own.sum() for own in squares.values())) or 1.0
    inside = {name: block for stack in targets.blocks(job.model) for block in stack for name in [f"{block}."]}
    return [
        Sensitivity(
            place=place.name,
            block=(block := next(inside[start] for start in inside if place.name.startswith(start))),
            kind=place.name.removeprefix(f"{block}."),
            size=sum(place.shape),
            share=float(squares[place.name].sum()) / whole,
            squares=tuple(squares[place.name][:LARGEST_RANK].tolist()),
        )
        for place in found
    ]


def places_of(model: PreTrainedModel) -> list[Place]:
    """The linear layers inside the blocks, which can have low-rank updates.

    Raises:
        UserError: the model has none that are known.
    """
    try:
        return targets.find(model, "all-linear")
    except ValueError as error:
        raise UserError(f"The layers of this model cannot be told apart: {error}") from error


def _first_batches(rows: Sequence[Encoded], training: TrainingConfig, count: int) -> Iterator[Sequence[int]]:
    """So many batches of rows, of several epochs if one has fewer."""
    order = WholeEpochs(rows, training.batch_size, training.seed)
    return itertools.islice(itertools.chain.from_iterable(map(order.batches, itertools.count())), count)


def _train_head(job: Job, batches: Sequence[Any]) -> None:
    optimizer = make_optimizer(job.adapter, job.recipe.training, job.rates)
    for batch in batches:
        backward(job.model, batch, job.recipe.training, pad_id(job.tokenizer))
        optimizer.step()
        optimizer.zero_grad()


def _gradients(job: Job, places: Sequence[Place], batches: Sequence[Any]) -> dict[str, Tensor]:
    """The mean gradient of each layer's weight, by its name."""
    weights: dict[str, Tensor] = {}
    for place in places:
        weight = place.layer.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UserError(f"{place.name} is quantized, and takes no gradient. Load the model unquantized.")
        weights[place.name] = weight.requires_grad_(True)
    for batch in batches:
        backward(job.model, batch, job.recipe.training, pad_id(job.tokenizer))
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad / len(batches)
        for name, weight in weights.items()
    }


def allot(found: Sequence[Sensitivity], budget: int, *, spread: float = SPREAD) -> Ranks:
    """The rank of each layer, a power of two or 0, that together have at most so many trained numbers.

    Args:
        found: the layers.
        budget: numbers that may be trained, the head's not counted.
        spread: how many times the rank that the budget would buy for every layer one may have; 1 it always may.

    Raises:
        UserError: the budget does not pay for a rank of 1 anywhere.
    """
    ranks = dict.fromkeys((layer.place for layer in found), 0)
    offers = [(-layer.squares[0] / layer.size, number, 1) for number, layer in enumerate(found)]
    heapq.heapify(offers)
    left, most = budget, max(1.0, spread * budget / sum(layer.size for layer in found))
    while offers:
        _, number, rank = heapq.heappop(offers)
        layer = found[number]
        more = (rank - ranks[layer.place]) * layer.size
        if more > left:
            continue  # a cheaper one may still fit
        left -= more
        ranks[layer.place] = rank
        gain = sum(layer.squares[rank : 2 * rank])
        if 2 * rank <= min(most, len(layer.squares)):
            heapq.heappush(offers, (-gain / (rank * layer.size), number, 2 * rank))
    if not any(ranks.values()):
        least = min(layer.size for layer in found)
        raise UserError(f"A budget of {budget:,} trained numbers buys nothing: a rank of 1 needs {least:,} at least.")
    return ranks


def allot_time(found: Sequence[Sensitivity], recipe: Recipe, seconds: float) -> Ranks:
    """The ranks with which training takes at most so long, as trial steps have it.

    A step's time hangs on how far down the gradient must go, and hardly on the ranks: so as many of the last blocks are
    trained as fit, with ranks of `RANK` in the mean.

    Args:
        found: the layers.
        recipe: what would be trained, and on what.
        seconds: of training, without evaluation.

    Raises:
        UserError: even the last block alone takes longer.
    """
    blocks = list(dict.fromkeys(layer.block for layer in found))
    planned: dict[int, float] = {}

    def ranks_from(first: int) -> Ranks:
        kept = [layer for layer in found if layer.block in blocks[first:]]
        return allot(kept, RANK * sum(layer.size for layer in kept))

    def fits(first: int) -> bool:
        spec = TechniqueSpec.parse(technique_of(found, ranks_from(first)))
        planned[first] = prepare(recipe.model_copy(update={"technique": spec})).plan().seconds
        return planned[first] <= seconds

    first = bisect.bisect_left(range(len(blocks)), True, key=fits)
    if first == len(blocks):
        raise UserError(
            f"A budget of {duration(seconds)} is too short: the last block alone takes about "
            f"{duration(min(planned.values()))}. Allow more, or lower training.epochs."
        )
    return ranks_from(first)


def allotted(found: Sequence[Sensitivity], recipe: Recipe, budget: str) -> Ranks:
    """The ranks that a budget buys, of numbers, of the bytes that they take in fp32, or of time.

    Raises:
        UserError: it buys nothing.
    """
    value, unit = amount(budget)
    if unit == "seconds":
        return allot_time(found, recipe, value)
    return allot(found, int(value if unit == "numbers" else value / FP32_BYTES))


def technique_of(
    found: Sequence[Sensitivity],
    ranks: Ranks,
    *,
    like: TechniqueSpec | None = None,
    owners: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """A recipe's technique with these ranks: one entry for each rank, at the layers that have it.

    Args:
        found: the layers.
        ranks: of each.
        like: the entries whose technique, scale, options and rates they have, but for layers; None: LoRA as it is.
        owners: of a layer, the number of the entry that it takes after; the first, unless it is there.
    """
    like = TechniqueSpec.parse("lora") if like is None else like
    layers: dict[tuple[int, int], dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for layer in found:
        stack, _, number = layer.block.rpartition(".")
        if rank := ranks.get(layer.place, 0):
            layers[rank, (owners or {}).get(layer.place, 0)][stack, layer.kind].append(number)
    entries: list[dict[str, Any]] = []
    for rank, owner in sorted(layers):
        part = like.parts[owner]
        own = {name: value for name, value in part.written().items() if name != "layers"}
        targets = "|".join(
            rf"{re.escape(stack)}\.({'|'.join(numbers)})\.{re.escape(kind)}"
            for (stack, kind), numbers in layers[rank, owner].items()
        )
        entries.append({**own, **part.method().resized("rank", rank), "targets": targets})
    if like.head_learning_rate is not None:
        entries[0]["head_learning_rate"] = like.head_learning_rate
    return entries


def low_rank(recipe: Recipe) -> TechniqueSpec | None:
    """The recipe's own LoRAs, whose options a chosen subset keeps; None: it trains something else."""
    return recipe.technique if all(part.name == LoRA.name for part in recipe.technique.parts) else None
