"""How many lines of code the techniques take here and in peft, blank lines and comments included.

    python benchmarks/lines.py

Techniques that both have are counted on both sides: here their files, there the folders of `peft/tuners` that hold them
(in LoRA's, rsLoRA, DoRA, PiSSA and what serves quantized layers).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import smidgen
from smidgen import METHODS

BOTH = {
    "lora": ["lora", "rslora", "dora", "pissa", "lora_fa", "lora_plus", "low_rank"],
    "adalora": ["adalora"],
    "vera": ["vera"],
    "loha": ["loha"],
    "lokr": ["lokr"],
    "miss": ["miss"],
    "ia3": ["ia3"],
    "oft": ["oft"],
    "hra": ["hra"],
    "ln_tuning": ["norm_tuning"],
    "prefix_tuning": ["prefix_tuning", "p_tuning_v2"],
    "prompt_tuning": ["prompt_tuning"],
    "p_tuning": ["p_tuning"],
    "adaption_prompt": ["llama_adapter"],
}
"""Folders of peft's tuners, and our files for the same techniques."""


def lines(*paths: Path) -> int:
    """Of all Python files in folders, and of files."""
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def main() -> None:
    ours = Path(smidgen.__file__).parent
    theirs = Path(str(find_spec("peft").origin)).parent  # type: ignore[union-attr]
    here = there = 0
    print(f"{'peft/tuners':20}{'peft':>8}{'smidgen':>9}")
    for folder, files in BOTH.items():
        own = lines(*(ours / "methods" / f"{file}.py" for file in files))
        other = lines(theirs / "tuners" / folder)
        here, there = here + own, there + other
        print(f"{folder:20}{other:8,}{own:9,}")
    print(f"{'together':20}{there:8,}{here:9,}")
    every = lines(ours / "methods")
    mechanism = lines(*(file for file in ours.glob("*.py") if file.stem not in ("__main__", "download", "embedded")))
    print(f"\nAll {len(METHODS)} techniques here: {every:,} lines, {every / len(METHODS):.0f} a technique.")
    print(f"What they share here (attachment, storage, rows, combining): {mechanism:,} lines.")
    shared = lines(theirs) - lines(theirs / "tuners") + lines(*theirs.glob("tuners/*.py"))
    print(f"What they share in peft: {shared:,} lines.")


if __name__ == "__main__":
    main()
