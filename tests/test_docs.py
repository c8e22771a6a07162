"""The pages are true: their code runs and prints what they show, their tables are the defaults, their links lead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import transformers
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel

import smidgen
from smidgen import METHODS, AdapterFusion, Method, Pfeiffer, attach, embedded
from smidgen.cli import app
from smidgen.manifest import Manifest
from smidgen.own import head_names
from smidgen.process.pretrain_recipe import (
    CorpusConfig,
    PretrainingConfig,
    PretrainRecipe,
    TokenizerConfig,
    load_pretrain_recipe,
)
from smidgen.process.recipe import ChooseConfig, DataConfig, Recipe, RefineConfig, StudyConfig, load_recipe
from smidgen.process.run_recipe import TrainingConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
TECHNIQUES = {page.stem: page for page in (DOCS / "techniques").glob("*.md")}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the file's line before its first, and `shown` the ```text block right after it."""

    language: str
    code: str
    line: int
    shown: str | None = None

    def printed(self) -> list[str]:
        """The lines that the page says it prints: the ```text block after it, or what stands behind each print."""
        if self.shown is not None:
            return self.shown.splitlines()
        return re.findall(r"^ *print\(.*\)  # (.*)$", self.code, flags=re.MULTILINE)


@functools.cache
def parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    tokens = parsed(page)
    found = []
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "fence" and token.map is not None:
            shows = after is not None and after.type == "fence" and after.info == "text"
            found.append(Block(token.info, token.content, token.map[0] + 1, after.content if after and shows else None))
    return found


def tables(page: Path) -> Iterator[list[list[str]]]:
    """Each table as rows of cells, without their backquotes."""
    rows: list[list[str]] = []
    for token in parsed(page):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 2:
            rows[-1].append(token.content.replace("`", ""))
        elif token.type == "table_close":
            yield rows
            rows = []


def table(page: Path, heading: str) -> dict[str, str]:
    """The first two columns of the table whose first column has this heading."""
    found = next((rows for rows in tables(page) if rows[0][0] == heading), None)
    assert found is not None, f"{page} has no table of {heading}"
    return {row[0]: row[1] for row in found[1:]}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_the_code_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [block for block in blocks(page) if block.language == "python"]
    for name in re.findall(r'model_folder\("(\w+)"\)', "".join(block.code for block in code)):
        if not embedded.available(name):
            pytest.skip(f"embedded:{name} is not in the cache; run python -m smidgen.embedded fetch")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where a class that the page defines looks for its names
    for block in code:
        source = "\n" * block.line + block.code  # so that a traceback names the page's own lines
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, str(page), "exec"), vars(module))
        if block.printed() or block.shown is not None:
            assert out.getvalue().splitlines() == block.printed(), f"{page}, line {block.line}"


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_yaml_block_is_a_recipe_or_a_part_of_one(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(block for block in blocks(page) if block.language == "yaml"):
        least = {"model": "embedded:minilm", "data": {"train": "embedded:tweets"}}
        path = tmp_path / f"{number}.yaml"
        path.write_text(block.code)
        if "corpus:" in block.code:
            assert load_pretrain_recipe(path), f"{page}, line {block.line}"
            continue
        if "model:" not in block.code:
            fields = least | yaml.safe_load(block.code)
            fields["data"] = least["data"] | fields["data"]
            path.write_text(yaml.safe_dump(fields))
        assert load_recipe(path), f"{page}, line {block.line}"


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_command_is_one_of_the_command_line_s(page: Path) -> None:
    group = typer.main.get_group(app)
    shell = "".join(block.code for block in blocks(page) if block.language == "sh").splitlines()
    inline = [child.content for token in parsed(page) for child in token.children or [] if child.type == "code_inline"]
    for line in shell + inline:
        _, smidgen_, words = line.partition("smidgen ")
        if not smidgen_ or line.startswith("#"):
            continue
        name, *rest = shlex.split(words, comments=True)
        command = group if name.startswith("-") else group.commands[name]
        options = {"--help"}.union(*(parameter.opts for parameter in command.params))
        assert {word for word in [name, *rest] if word.startswith("-")} <= options, line


def heading_anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MyST give the headings."""
    tokens = parsed(page)
    titles = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    for token in parsed(page):
        for child in token.children or []:
            if child.type == "link_open":
                yield str(child.attrs["href"])
            elif child.type == "image":
                yield str(child.attrs["src"])


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        address, _, anchor = link.partition("#")
        if ":" in address:
            assert address.startswith("https://"), f"{page}: {link}"
            continue
        target = (page.parent / address).resolve() if address else page
        assert target.is_file(), f"{page}: {link} leads to no file"
        if anchor:
            assert anchor in heading_anchors(target), f"{page}: {link} leads to no heading of {target.name}"


def test_every_page_is_on_the_map() -> None:
    listed = {link for page in (DOCS / "index.md", DOCS / "techniques" / "index.md") for link in links(page)}
    assert {page.stem for page in DOCS.rglob("*.md")} - {Path(link).stem for link in listed} <= {"index"}


def test_each_technique_has_a_page_and_each_page_a_technique() -> None:
    assert TECHNIQUES.keys() - {"index"} == METHODS.keys()


def shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_defaults_on_a_page_are_the_technique_s(method: type[Method]) -> None:
    options = {field.name: shown(field.default) for field in dataclasses.fields(method)}
    said = {f"learning rate, {part}": shown(rate) for part, rate in method.learning_rates.items()}
    assert table(TECHNIQUES[method.name], "option") == options | said


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_page_names_the_technique_its_source_and_its_picture(method: type[Method]) -> None:
    page = TECHNIQUES[method.name]
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {method.title}\n")
    assert (
        method.paper in ("the baseline", "no paper")
        or f"https://arxiv.org/abs/{method.paper.removeprefix('arXiv:')}" in text
    )
    assert f"pictures/{method.name}.svg" in links(page)


def test_the_counts_on_the_pages_are_those_of_minilm() -> None:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = transformers.BertForSequenceClassification(config)
    head = sum(model.get_parameter(name).numel() for name in head_names(model))
    for name in "ab":
        attach(model, Pfeiffer(), name=name)
    for name, kind in METHODS.items():
        method = AdapterFusion(adapters="a, b") if kind is AdapterFusion else kind()
        adapter = attach(model, method if method.keeps_base else dataclasses.replace(method, keep_base=True))
        count = adapter.trainable if name == "head" else adapter.trainable - head
        said = re.findall(r"MiniLM-L6[^.]*?([\d,]+) trained numbers", TECHNIQUES[name].read_text(encoding="utf-8"))
        assert said == [f"{count:,}"], name
        adapter.detach()


@pytest.mark.parametrize("name", METHODS)
def test_a_picture_is_readable_in_light_and_dark(name: str) -> None:
    picture = ElementTree.parse(DOCS / "techniques" / "pictures" / f"{name}.svg").getroot()
    assert "color-scheme: light dark" in picture.attrib["style"]
    colours = {element.get(kind) for element in picture.iter() for kind in ("fill", "stroke")} - {None}
    assert colours == {"none", "currentColor", "#fff", "#2563eb"}  # the text's colour, and one for what is trained


def defaults(model: type[BaseModel], above: str = "") -> dict[str, Any]:
    """Every field of a recipe with its default as YAML has it; a field without one is required."""
    found = {}
    for name, field in model.model_fields.items():
        if field.annotation not in (DataConfig, TrainingConfig):
            default = field.get_default(call_default_factory=True)
            found[above + name] = "required" if field.is_required() else json.dumps(default)
    return found


@pytest.mark.parametrize(("heading", "section"), [("data.", DataConfig), ("training.", TrainingConfig)])
def test_the_recipe_s_page_has_every_field_and_its_default(heading: str, section: type[BaseModel]) -> None:
    page = DOCS / "recipe.md"
    tabled = next(rows for rows in tables(page) if rows[0][0] == "field" and rows[1][0].startswith(heading))
    assert {row[0]: row[1] for row in tabled[1:]} == defaults(section, heading)


def test_the_recipe_s_page_has_every_field_at_the_top() -> None:
    top = table(DOCS / "recipe.md", "field")
    assert [name for name in top if "." not in name] == [name for name in Recipe.model_fields if name in top]
    assert set(Recipe.model_fields) - set(top) <= {"data", "training"}


def test_the_page_on_studies_has_every_field_and_its_default() -> None:
    sections = {"study.": StudyConfig, "refine.": RefineConfig, "choose.": ChooseConfig}
    wanted = {name: value for above, kind in sections.items() for name, value in defaults(kind, above).items()}
    tabled = {row[0]: row[1] for rows in tables(DOCS / "studies.md") if rows[0][0] == "field" for row in rows[1:]}
    assert tabled == wanted


def test_the_page_on_pretraining_has_every_field_and_its_default() -> None:
    first, training = (
        {row[0]: row[1] for row in rows[1:]} for rows in tables(DOCS / "pretraining.md") if rows[0][0] == "field"
    )
    sections = {"tokenizer.": TokenizerConfig, "corpus.": CorpusConfig}
    wanted = {k: v for section, kind in sections.items() for k, v in defaults(kind, section).items()}
    assert wanted.items() <= first.items()
    assert {name.split(".")[0] for name in first} | {"training"} == set(PretrainRecipe.model_fields)
    own = defaults(PretrainingConfig, "training.")
    shared = defaults(TrainingConfig, "training.")
    assert training == {name: value for name, value in own.items() if shared.get(name) != value}


def test_the_page_on_storage_has_every_field_of_the_manifest() -> None:
    assert table(DOCS / "storage.md", "key").keys() == Manifest.model_fields.keys()


def test_every_public_name_has_a_docstring() -> None:
    public = {name: getattr(smidgen, name) for name in smidgen.__all__}
    documented = [name for name, value in public.items() if callable(value)]
    assert set(public) - set(documented) == {"METHODS"}
    for name in documented:
        docstring = public[name].__doc__
        assert docstring, name
        assert not docstring.startswith(f"{name}("), f"{name} has the docstring that dataclass makes"


def test_the_lines_of_code_are_those_of_this_version() -> None:
    """As `benchmarks/lines.py` counts them, to a hundred."""
    done = subprocess.run([sys.executable, "benchmarks/lines.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, both, _, every, shared, theirs = (
        [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", line)] for line in done.stdout.splitlines()
    )
    page = (DOCS / "techniques" / "index.md").read_text("utf-8")
    said = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) lines", page)]
    assert said == pytest.approx([both[1], both[0], every[1], shared[0], theirs[0]], abs=100)
