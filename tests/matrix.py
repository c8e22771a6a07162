"""Every technique on an encoder, a decoder, an encoder-decoder and a vision model: what works, and what is refused.

    python -m tests.matrix

writes docs/matrix.md; test_matrix.py tries every cell again and compares.
"""

from __future__ import annotations

import dataclasses
import re
import string
import tempfile
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import smidgen
from smidgen import METHODS, Adapter, AdapterFusion, Method, attach, load, parameter_groups, rows, save_peft
from tests import conftest
from tests.methods.test_contract import disturb

Batch = dict[str, torch.Tensor]
Make = Callable[[], PreTrainedModel]

KINDS = {
    "encoder": ("bert", "BERT, classifying texts"),
    "decoder": ("llama", "Llama, generating"),
    "encoder-decoder": ("bart", "BART, generating"),
    "vision": ("vit", "ViT, classifying images"),
}
"""The architecture that stands for each kind of model."""

WORKS = "works"
PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
INTRODUCTION = """# What works where

Every technique on every kind of model, tried cell by cell on tiny models; `python -m tests.matrix` writes this page,
and the tests try each cell again. A cell works or is refused with an error that says why: nothing is silently ignored.
A letter is a reason below its own table, in which … stands for the technique.

| claim | what is tried |
|---|---|
| trains | five steps lower the loss, everything that is trained gets a gradient, and nothing else changes |
| save | saved, and loaded into another copy of the model, it answers the same: to the bit, or to 1e-6 (P-tuning) |
| merge | merged into the weights it gives the same answers, to 1e-5 |
| detach | afterwards the model is the base model, to the bit |
| rows | in a batch beside rows of the base model, each row has the answer that it has in a batch of one adapter |
| recompute | gradient checkpointing changes no gradient |
| compile | `torch.compile(fullgraph=True)` takes the model without a break, and the answers are the same |
| generate | with and without the cache the same tokens come out |
| bf16 | on a bfloat16 model what is added stays in fp32, and the answers are about as exact as the model's own |
| to peft | written by `save_peft`, it gives the same answers in peft, to 1e-5 |
| from peft | written again by peft, it opens here and gives the same answers, to 1e-5 |
| Trainer | Hugging Face's Trainer trains it, and nothing else |"""


def build(kind: str) -> PreTrainedModel:
    """A tiny model of a kind, the same each time."""
    return conftest.build(KINDS[kind][0])


def make_batch(kind: str) -> Batch:
    """Four rows for it."""
    return conftest.make_batch(KINDS[kind][0])


def method(technique: str, kind: str) -> Method:
    """The technique with options that fit the tiny models."""
    if technique == "adapter-fusion":
        return AdapterFusion(adapters=conftest.fused(build, kind))
    found = METHODS[technique](**conftest.OPTIONS.get(technique, {}))
    return found if found.keeps_base else dataclasses.replace(found, keep_base=True)


def answers(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The model's logits, zero in the padding."""
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    mask = batch.get("attention_mask")
    if mask is not None and found.dim() == 3:
        found = found[:, -mask.shape[1] :] * mask[..., None]  # peft does not cut a prompt's columns off
    return found.clone()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def trains(technique: str, kind: str) -> None:
    """Five steps lower the loss and change nothing but the adapter's parameters, which all get a gradient."""
    model, batch = build(kind), make_batch(kind)
    adapter = _attached(model, technique, kind)
    adapter.clock.steps = 5
    before = _parameters(model)
    optimizer = torch.optim.AdamW(parameter_groups(adapter, 0.01))
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        if not losses:
            adapter.check_gradients()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    _check_changes(model, adapter, before)
    if technique != "hard-prompt":  # its tokens jump
        assert losses[-1] < losses[0]


def saves(technique: str, kind: str) -> None:
    """Loaded into another copy of the model it answers the same, to the bit."""
    model, batch = build(kind), make_batch(kind)
    adapter = _disturbed(model, technique, kind)
    expected, again = answers(model, batch), build(kind)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "saved")
        load(again, Path(folder) / "saved")
    if adapter.methods[0] == adapter.methods[0].folded(adapter.deltas[0]):
        assert torch.equal(answers(again, batch), expected)
    else:  # a reparameterization is folded away, and its product computed anew
        close(answers(again, batch), expected, 1e-6)


def merges(technique: str, kind: str) -> None:
    """Merged into the weights it answers the same."""
    model, batch = build(kind), make_batch(kind)
    adapter = _disturbed(model, technique, kind)
    expected = answers(model, batch)
    adapter.merge()
    close(answers(model, batch), expected)


def detaches(technique: str, kind: str) -> None:
    """Afterwards the model is the base model, to the bit."""
    model, batch = build(kind), make_batch(kind)
    state, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, answers(model, batch)
    adapter = _disturbed(model, technique, kind)
    assert not torch.equal(answers(model, batch), before)
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert torch.equal(answers(model, batch), before)


def serves_rows(technique: str, kind: str) -> None:
    """Beside rows of the base model each row answers as it does alone."""
    model, batch = build(kind), make_batch(kind)
    expected = answers(model, batch)
    _disturbed(model, technique, kind)
    changed = answers(model, batch)
    expected[0], expected[2:] = changed[0], changed[2:]
    with rows(model, ["one", None, "one", "one"]):
        close(answers(model, batch), expected, 5e-5)


def recomputes(technique: str, kind: str) -> None:
    """Gradient checkpointing changes no gradient."""
    gradients = []
    for recomputing in (False, True):
        model, batch = build(kind), make_batch(kind)
        adapter = _disturbed(model, technique, kind)
        if recomputing:
            new = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.23
            (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
        model.train()
        torch.manual_seed(3)  # of dropout
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert gradients[0]
    assert len(gradients[0]) == len(gradients[1])
    for found, expected in zip(*gradients, strict=True):
        close(found, expected, 1e-4)


def compiles(technique: str, kind: str) -> None:
    """torch.compile takes the model without a break, and its answers are the same."""
    model, batch = build(kind), make_batch(kind)
    _disturbed(model, technique, kind)
    expected = answers(model, batch)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(answers(compiled, batch), expected)  # type: ignore[arg-type]
    finally:
        torch._dynamo.reset()


def generates(technique: str, kind: str) -> None:
    """Generation with the cache gives the tokens of generation without it."""
    model, batch = build(kind), make_batch(kind)
    _disturbed(model, technique, kind)
    ids = batch["input_ids"][::2]
    found = [
        model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=cached
        )
        for cached in (True, False)
    ]
    assert torch.equal(*found)


def halves(technique: str, kind: str) -> None:
    """On a bfloat16 model what is added is fp32 with finite gradients, and about as exact as the model by itself."""
    expected_model, model, batch = build(kind), build(kind).to(torch.bfloat16), make_batch(kind)
    rounded = batch | {k: value.bfloat16() for k, value in batch.items() if value.is_floating_point()}
    alone = _error(answers(model, rounded), answers(expected_model, batch))
    state = _disturbed(expected_model, technique, kind).state()
    adapter = _disturbed(model, technique, kind)  # with the same frozen parts
    adapter.load_state(state)
    model(**rounded).loss.backward()
    own = set(adapter.own_names)
    assert {parameter.dtype for name, parameter in adapter.named_parameters() if name not in own} <= {torch.float32}
    gradients = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    error = _error(answers(model, rounded), answers(expected_model, batch))
    assert error < max(4 * alone, 0.02), (error, alone)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def peft_reads(technique: str, kind: str) -> None:
    """A folder of save_peft opens in peft, and answers the same there."""
    model, batch = build(kind), make_batch(kind)
    adapter = _disturbed(model, technique, kind)
    expected = answers(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_peft(adapter, Path(folder) / "saved")
        close(answers(_in_peft(kind, Path(folder) / "saved"), batch), expected)


def reads_peft(technique: str, kind: str) -> None:
    """A folder that peft has written anew opens here, and answers the same."""
    model, batch = build(kind), make_batch(kind)
    adapter = _disturbed(model, technique, kind)
    with tempfile.TemporaryDirectory() as folder:
        save_peft(adapter, Path(folder) / "ours")
        theirs = _in_peft(kind, Path(folder) / "ours")
        theirs.save_pretrained(str(Path(folder) / "theirs"))
        expected, again = answers(theirs, batch), build(kind)
        load(again, Path(folder) / "theirs")
        close(answers(again, batch), expected)


def trains_in_trainer(technique: str, kind: str) -> None:
    """Hugging Face's Trainer changes the adapter's parameters and nothing else."""
    model, batch = build(kind), make_batch(kind)
    adapter = _attached(model, technique, kind)
    adapter.clock.steps = 2
    before = _parameters(model)
    data = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        optimizer = torch.optim.AdamW(parameter_groups(adapter, 0.01))
        Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    _check_changes(model, adapter, before)


def _parameters(model: PreTrainedModel) -> Batch:
    """A copy of everything on the model."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _check_changes(model: PreTrainedModel, adapter: Adapter, before: Batch) -> None:
    """Something of the adapter changed, and nothing else."""
    trained = {id(parameter) for parameter in adapter.parameters()}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert changed <= {name for name, parameter in model.named_parameters() if id(parameter) in trained}


def _attached(model: PreTrainedModel, technique: str, kind: str) -> Adapter:
    return attach(model, method(technique, kind), name="one")


def _disturbed(model: PreTrainedModel, technique: str, kind: str) -> Adapter:
    """An adapter that is no longer where it started, the same each time."""
    torch.manual_seed(1)
    adapter = _attached(model, technique, kind)
    disturb(adapter)
    return adapter


def _in_peft(kind: str, folder: Path) -> PreTrainedModel:
    """The model with the adapter of a folder on it, as peft opens it."""
    import peft

    return peft.PeftModel.from_pretrained(build(kind), folder).eval()


CLAIMS: dict[str, Callable[[str, str], None]] = {
    "trains": trains,
    "save": saves,
    "merge": merges,
    "detach": detaches,
    "rows": serves_rows,
    "recompute": recomputes,
    "compile": compiles,
    "generate": generates,
    "bf16": halves,
    "to peft": peft_reads,
    "from peft": reads_peft,
    "Trainer": trains_in_trainer,
}
NOT_ASKED = {("encoder", "generate"), ("vision", "generate")}
"""Models of these kinds do not generate."""


def outcome(claim: str, technique: str, kind: str) -> str:
    """WORKS, or what a clear error of ours said; any other failure is raised."""
    torch.manual_seed(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CLAIMS[claim](technique, kind)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if not _is_ours(error):
            raise
        return " ".join(str(error).split()).replace(METHODS[technique].title, "…")
    return WORKS


def _is_ours(error: BaseException) -> bool:
    """Whether smidgen itself raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(last).is_relative_to(Path(smidgen.__file__).parent)


def cells(technique: str, kind: str) -> dict[str, str]:
    """The outcomes of all claims."""
    return {claim: outcome(claim, technique, kind) for claim in CLAIMS if (kind, claim) not in NOT_ASKED}


def render(outcomes: dict[str, dict[str, dict[str, str]]]) -> str:
    """The page: a table for each kind of model, and what the letters in it stand for."""
    lines = [INTRODUCTION]
    for kind, (_, model) in KINDS.items():
        claims = [claim for claim in CLAIMS if (kind, claim) not in NOT_ASKED]
        lines += ["", f"## {kind.capitalize()}: {model}", "", f"| technique | {' | '.join(claims)} |"]
        lines += ["|---|" + "---|" * len(claims)]
        reasons: dict[str, str] = {}
        for technique, found in outcomes[kind].items():
            cells = [_letter(found[claim], reasons) for claim in claims]
            lines.append(f"| [{METHODS[technique].title}](techniques/{technique}.md) | {' | '.join(cells)} |")
        lines += [f"\n{letter}: {reason}" for reason, letter in reasons.items()]
    return "\n".join(lines) + "\n"


def _letter(found: str, reasons: dict[str, str]) -> str:
    return "yes" if found == WORKS else reasons.setdefault(found, string.ascii_lowercase[len(reasons)])


def parse(page: str) -> dict[str, dict[str, dict[str, str]]]:
    """The outcomes that a page of `render` states."""
    by_page = {f"techniques/{name}.md": name for name in METHODS}
    outcomes = {}
    for kind, section in zip(KINDS, page.split("\n## ")[1:], strict=True):
        reasons = dict(re.findall(r"^([a-z]): (.*)$", section, re.MULTILINE)) | {"yes": WORKS}
        head, *table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        outcomes[kind] = {
            by_page[re.findall(r"\]\((.*)\)", name)[0]]: dict(zip(head[1:], map(reasons.get, cells), strict=True))
            for name, *cells in table
        }
    return outcomes


def main() -> None:
    """Try everything, and write the page."""
    with ProcessPoolExecutor() as pool:
        found = {(t, k): pool.submit(cells, t, k) for k in KINDS for t in METHODS}
        outcomes = {kind: {name: found[name, kind].result() for name in METHODS} for kind in KINDS}
    PAGE.write_text(render(outcomes), "utf-8")


if __name__ == "__main__":
    main()
