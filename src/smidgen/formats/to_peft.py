"""Write an adapter so that huggingface/peft loads it, to the same logits, or say why it cannot.

What peft has no technique for, but what changes weights, can be written as LoRA of a given rank, by a singular value
decomposition of each layer's change; how much of the change is lost is returned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from smidgen import files
from smidgen.errors import UserError
from smidgen.formats.from_peft import CONFIG, TENSORS
from smidgen.formats.peft_writers import WRITERS, Layered, Written, by_svd, low_rank, norms
from smidgen.layers import is_conv1d
from smidgen.methods import (
    HRA,
    OFT,
    AdaLoRA,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAPlus,
    MiSS,
    NormTuning,
    PiSSA,
    RsLoRA,
)
from smidgen.own import own_parameters

if TYPE_CHECKING:
    from smidgen.adapter import Adapter

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
}
_NO_CONV1D = (LoHa, LoKr, MiSS, OFT, HRA)
"""What peft does not put on GPT-2's layers."""
_LOW_RANK = (LoRA, RsLoRA, LoRAPlus, LoRAFA, PiSSA, AdaLoRA)


def save_peft(adapter: Adapter, path: str | Path, *, rank: int | None = None) -> float:
    """Write the adapter to the folder `path` as peft has it; it appears whole or not at all.

    Args:
        adapter: what to write.
        path: the folder.
        rank: write a LoRA of this rank, the nearest to the adapter's change of each weight; None: write the technique
            itself, if peft has it.

    Returns:
        The share of the change that was lost, as a ratio of Frobenius norms; 0 where the technique itself was written.

    Raises:
        UserError: peft has no such technique and `rank` is None, a LoRA cannot stand for the adapter, or the rank is no
            whole number of at least 1.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"rank={rank!r} is not a whole number of at least 1.")
    head = _modules_to_save(adapter)
    written = _convert(adapter, rank)
    is_prompt = "prompt_embeddings" in written.tensors
    parameters = dict(adapter.named_parameters())
    for module, names in head.items():
        prefix = "base_model." if is_prompt else "base_model.model."
        written.tensors.update({f"{prefix}{module}.{name}": parameters[f"{module}.{name}"] for name in names})
    config = {
        "base_model_name_or_path": str(adapter.model.config._name_or_path),
        "task_type": next((task for end, task in _TASKS.items() if type(adapter.model).__name__.endswith(end)), None),
        "inference_mode": True,
        "modules_to_save": sorted(head) or None,
        **written.config,
    }
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in written.tensors.items()}
    with files.new_folder(Path(path)) as folder:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return written.lost


def _convert(adapter: Adapter, rank: int | None) -> Written:
    if rank is not None:
        return by_svd(adapter, rank)
    if _is_norm_tuning(adapter):
        return norms(adapter)
    layered = [number for number, places in enumerate(adapter.places) if places]  # others train the model's own
    methods = [adapter.methods[number] for number in layered]
    if methods and all(isinstance(method, _LOW_RANK) for method in methods):
        return low_rank(adapter)
    knows_layers = not any(is_conv1d(place.layer) for _, place, _ in adapter.entries())
    if len(methods) == 1 and type(methods[0]) in WRITERS and (knows_layers or type(methods[0]) not in _NO_CONV1D):
        try:
            return WRITERS[type(methods[0])](Layered(adapter, layered[0]))
        except ValueError as error:
            raise UserError(f"peft cannot hold this adapter: {error}") from error
    title = " + ".join(method.title for method in methods or adapter.methods)
    if not methods:
        raise UserError(
            f"peft has no {title}, which trains the model's own weights. Merge the adapter, and save the model."
        )
    if not all(delta.mergeable for _, _, delta in adapter.entries()):
        raise UserError(f"peft has no {title}, and it is more than a change of weights, which LoRA could stand for.")
    raise UserError(
        f"peft has no {title}. A LoRA can stand for its change of each weight, with a loss that is said: pass a rank, "
        "such as rank=16."
    )


def _modules_to_save(adapter: Adapter) -> dict[str, list[str]]:
    """The modules of the model's own that are trained whole, with their parameters' names.

    Raises:
        UserError: a part of a module is trained, which peft cannot say.
    """
    own = adapter.head_names if _is_norm_tuning(adapter) else adapter.own_names
    modules: dict[str, list[str]] = {}
    for name in sorted(own):
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, []).append(parameter)
    for module, names in list(modules.items()):
        every = {name for name, _ in own_parameters(adapter.model.get_submodule(module))}
        if set(names) != every:
            raise UserError(
                f"peft keeps whole modules, and of {module} only {', '.join(names)} is trained. Merge the adapter "
                "instead, and save the model."
            )
    return dict(_topmost(adapter, modules))


def _topmost(adapter: Adapter, modules: Mapping[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """The largest modules that are trained whole, with the names of all their parameters."""
    whole = {f"{module}.{name}" for module, names in modules.items() for name in names}
    done: set[str] = set()
    for module in modules:
        top = module
        while "." in top:
            above = top.rpartition(".")[0]
            names = {f"{above}.{name}" for name, _ in own_parameters(adapter.model.get_submodule(above))}
            if not names <= whole:
                break
            top = above
        if top not in done:
            done.add(top)
            inside = own_parameters(adapter.model.get_submodule(top))
            yield top, [name for name, _ in inside if f"{top}.{name}" in whole]


def _is_norm_tuning(adapter: Adapter) -> bool:
    """Whether it is norm tuning alone, which peft keeps in tensors of their own; other norms are whole modules."""
    return [type(method) for method in adapter.methods] == [NormTuning]
