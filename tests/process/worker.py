"""What each process of test_distributed.py runs: the jobs listed in a file, one after the other."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from smidgen.errors import Interrupted
from smidgen.process import train as training
from smidgen.process.job import Job
from smidgen.process.opening import prepare
from smidgen.process.parallel import is_sharded, this_process
from smidgen.process.recipe import load_recipe
from smidgen.process.run import run as train


def run(recipe: str, changes: list[str], *, resume: bool = False, stop_at: int | None = None) -> Job:
    """Train without dropout, which differs between processes, until the end or until Ctrl-C comes at a step."""
    job = prepare(load_recipe(recipe, changes))
    for module in job.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    real = training._check_finite

    def check(loss: float, norm: float, step: int, rate: float) -> None:
        real(loss, norm, step, rate)
        if step + 2 == stop_at and this_process().is_main_process:  # one process hears it, and all stop
            signal.raise_signal(signal.SIGINT)

    training._check_finite = check
    try:
        with contextlib.suppress(Interrupted):
            train(job, resume=resume, quiet=True)
    finally:
        training._check_finite = real
    return job


def held(job: Job) -> float:
    """How much of the model this process holds."""
    parameters = list(job.model.parameters())
    own = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    return sum(part.numel() for part in own) / sum(parameter.numel() for parameter in parameters)


def main() -> None:
    """Run the jobs, and write down how."""
    path = Path(sys.argv[1])
    facts = []
    for entry in json.loads(path.read_text()):
        job = run(entry["recipe"], entry["changes"], resume=entry["resume"], stop_at=entry["stop_at"])
        facts.append({"processes": this_process().num_processes, "sharded": is_sharded(job.model), "held": held(job)})
    if this_process().is_main_process:
        path.with_suffix(".facts").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
