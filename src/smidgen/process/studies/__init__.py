"""The five promises of parameter-efficient fine-tuning, each measured by a study of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from smidgen.process.data import TaskData
from smidgen.process.finding import Finding
from smidgen.process.recipe import Recipe
from smidgen.process.studies.cost import study_cost
from smidgen.process.studies.forgetting import study_forgetting
from smidgen.process.studies.little_data import study_little_data
from smidgen.process.studies.parity import study_parity
from smidgen.process.studies.portability import study_portability
from smidgen.process.trainer import Trainer

Study = Callable[[Recipe, TaskData, Trainer], Finding]

STUDIES: Final[Mapping[str, Study]] = {
    "cost": study_cost,
    "forgetting": study_forgetting,
    "little-data": study_little_data,
    "portability": study_portability,
    "parity": study_parity,
}
