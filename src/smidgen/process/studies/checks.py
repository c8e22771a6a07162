"""What the studies ask of a recipe alike."""

from __future__ import annotations

from smidgen.errors import UserError
from smidgen.process.compare import BASELINE
from smidgen.process.data import TaskData, load_data, shared_texts
from smidgen.process.recipe import Recipe
from smidgen.process.splits import normalize


def needs_full(recipe: Recipe) -> str:
    """The slug of full fine-tuning among what is compared.

    Raises:
        UserError: it is not there.
    """
    found = next((spec.slug for spec in recipe.compare if spec.name == BASELINE), None)
    if found is None:
        given = ", ".join(spec.slug for spec in recipe.compare)
        raise UserError(f"compare=[{given}] lacks {BASELINE}, which this study compares the others with. Add it.")
    if len(recipe.compare) < 2:
        raise UserError(f"compare=[{found}] holds nothing beside {BASELINE} to study.")
    return found


def check_tasks(recipe: Recipe, data: TaskData) -> tuple[str, ...]:
    """Notes on texts of the test split that another task of `study.tasks` trains on.

    Args:
        recipe: names the tasks.
        data: of its own task.

    Raises:
        UserError: names the task whose data cannot be read.
    """
    notes: list[str] = []
    for name, config in recipe.study.tasks.items():
        try:
            other = load_data(config, recipe.task)
        except UserError as error:
            raise UserError(f"study.tasks.{name}: {error}") from error
        tested, trained = ([normalize(row.text) for row in rows] for rows in (data.test, other.train))
        notes += shared_texts(tested, trained, "data.test", f"study.tasks.{name}")
    return tuple(notes)


def several_seeds(recipe: Recipe) -> None:
    """Raise a UserError if there is a single seed, which says nothing about chance."""
    if len(recipe.seeds) < 2:
        raise UserError(f"seeds={list(recipe.seeds)} is a single one, and says nothing about chance: give 3 or more.")
