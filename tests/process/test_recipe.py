from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smidgen.methods
from smidgen.delta import Method
from smidgen.errors import UserError
from smidgen.methods import METHODS
from smidgen.process.overrides import override
from smidgen.process.problems import Problems
from smidgen.process.recipe import COMPARED, Recipe, load_recipe
from smidgen.process.strict_yaml import dump, parse
from smidgen.process.technique import Part, TechniqueSpec

SMALLEST = "model: embedded:minilm\ndata: {train: train.csv}\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparkle(Method):
    """A technique with a field of each type."""

    name = "sparkle"

    size: int = 8
    scale: float = 1.0
    gated: bool = False
    spots: tuple[str, ...] = ()
    start: str | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Sparkle's size must be at least 1, got {self.size}.")


@pytest.fixture
def sparkle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smidgen.methods.METHODS, "sparkle", Sparkle)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder, text, *overrides)
    return str(error.value)


def test_two_lines_are_a_recipe_with_every_default(tmp_path):
    recipe = load(tmp_path, SMALLEST)
    assert recipe.task == "classification"
    assert recipe.technique.name == "lora"
    assert [spec.name for spec in recipe.compare] == list(COMPARED)
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.seeds) == (3, 32, (0,))


def test_generation_has_no_head_to_compare(tmp_path):
    names = [spec.name for spec in load(tmp_path, SMALLEST, "task=generation").compare]
    assert names == [name for name in COMPARED if name != "head"]


@pytest.mark.parametrize(
    "entry",
    [
        "training.head_learning_rate=0.1",
        "technique={name: lora, head_learning_rate: 0.1}",
        "compare=[lora, {name: full, head_learning_rate: 0.1}]",
    ],
)
def test_generation_has_no_head_with_a_rate(tmp_path, entry):
    assert "head_learning_rate is that of a task's head" in refusal(tmp_path, SMALLEST, "task=generation", entry)
    load(tmp_path, SMALLEST, entry)


def test_paths_are_relative_to_the_recipes_folder(tmp_path):
    (tmp_path / "encoder").mkdir()
    recipe = load(tmp_path, "model: encoder\ndata: {train: ../a.csv, validation: hub:a/b, test: embedded:tweets}")
    assert recipe.model == str(tmp_path / "encoder")
    assert recipe.data.train == str(tmp_path.parent / "a.csv")
    assert (recipe.data.validation, recipe.data.test) == ("hub:a/b", "embedded:tweets")
    assert recipe.output == str(tmp_path / "runs" / "recipe")


def test_folders_of_adapters_are_relative_to_the_recipes_folder(tmp_path):
    (tmp_path / "beside").mkdir()
    fusion = 'technique: {name: adapter-fusion, adapters: "runs/a/adapter, beside, a name"}'
    recipe = load(tmp_path, f"model: m\ndata: {{train: a.csv}}\n{fusion}")
    (method,) = recipe.technique.methods()
    assert method.adapters == f"{tmp_path}/runs/a/adapter, {tmp_path}/beside, a name"


@pytest.mark.parametrize("model", ["embedded:minilm", "sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased"])
def test_a_model_that_is_no_folder_keeps_its_name(tmp_path, model):
    assert load(tmp_path, f"model: {model}\ndata: {{train: a.csv}}").model == model


def test_a_model_written_as_a_path_is_a_path_even_before_it_exists(tmp_path):
    assert load(tmp_path, "model: ./later\ndata: {train: a.csv}").model == str(tmp_path / "later")


def test_the_column_of_another_task_is_refused(tmp_path):
    said = refusal(tmp_path, "model: m\ntask: token-classification\ndata: {train: a.csv, label: slots}")
    assert said.endswith(
        "recipe.yaml: data.label='slots' is a column of task=classification; that of task=token-classification is "
        "data.spans."
    )
    recipe = load(tmp_path, "model: m\ntask: generation\ndata: {train: a.csv, answer: reply}")
    assert load(tmp_path, recipe.written()) == recipe


def test_every_mistake_is_named_in_one_error_with_its_value_and_what_would_do(tmp_path):
    message = refusal(
        tmp_path,
        SMALLEST + "technique: {name: lora, ranks: 4, rank: '8'}\n"
        "training: {epoch: 5, batch_size: 0, schedule: line, gradient_checkpointing: 1}\n"
        "epochs: 3\nbatch: 4\ncompare: [lora, lroa, {name: lora, rank: 0}, {rank: 2}]\nseeds: [1, 1]\n",
    )
    assert message.splitlines() == [
        f"{tmp_path / 'recipe.yaml'} has 12 mistakes:",
        "  technique.ranks is no option of lora. Did you mean 'rank'? Known: rank, alpha, dropout, targets, layers.",
        "  technique.rank='8' must be a whole number.",
        "  compare.1='lroa' is no technique. Did you mean 'lora'?",
        "  compare.2: LoRA's rank must be at least 1, got 0.",
        "  compare.3={'rank': 2} must be a technique's name, or a mapping with `name` and its options.",
        "  training.batch_size=0 must be at least 1.",
        "  training.schedule='line' must be 'linear', 'cosine' or 'constant'.",
        "  training.gradient_checkpointing=1 must be true or false.",
        "  training.epoch is no field of a recipe. Did you mean training.epochs?",
        "  seeds=[1, 1] must be a list of different seeds, such as [0, 1, 2].",
        "  epochs is no field of a recipe. Did you mean training.epochs?",
        "  batch is no field of a recipe. Did you mean training.batch_size?",
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("training: {learning_rate: .nan}", "training.learning_rate=nan must be a finite number."),
        ("training: {epochs: 2.0}", "training.epochs=2.0 must be a whole number."),
        ("training: {epochs: true}", "training.epochs=true must be a whole number."),
        ("training: {clip: '1'}", "training.clip='1' must be a number."),
        ("training: 3", "training=3 must be a section with fields of its own."),
        ("training: {batch_size: 4, micro_batch_size: 8}", "training: micro_batch_size=8 is above batch_size=4"),
        ("seeds: 3", "seeds=3 must be a list."),
        ("compare: []", "compare=[] holds no technique."),
        ("compare: [lora, {name: lora, rank: 8}]", "holds lora twice."),
        ("technique: []", "technique=[] holds no technique."),
        ("technique: [lora, {name: head, rank: 1}]", "technique.1.rank is no option of head."),
        ("technique: {name: lora, learning_rate: 0}", "technique.learning_rate=0 must be greater than 0."),
        ("task: sorting", "task='sorting' must be 'classification', 'token-classification' or 'generation'."),
        ("output: ''", "output='' is empty."),
        ("output: 5", "output=5 must be text: write it in quotes."),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, lines, said):
    assert said in refusal(tmp_path, SMALLEST + lines)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{}", "data.train is not given"),
        ("{train: null}", "data.train=null must be text."),
        ("{train: a.csv, label: 1}", "data.label=1 must be text: write it in quotes."),
        ("{train: a.csv, test_share: 1.5}", "data.test_share=1.5 must be less than 1."),
        ("{train: a.csv, test_share: .5, validation_share: .5}", "leave no row to train on"),
        ("{train: a.csv, template: 'Question:'}", "template='Question:' must hold {text} once"),
    ],
)
def test_wrong_data_is_refused(tmp_path, data, said):
    assert said in refusal(tmp_path, f"model: m\ndata: {data}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a", "holds ['a'], not fields"),
        ("model: [a", "line 1, column 10"),
        ("model: a\nmodel: b", "line 2, column 1: the key 'model' is given twice"),
        ("data: {train: a, train: b}", "the key 'train' is given twice"),
        ("1: a", "the key 1 is not text"),
        ("data:\n  template: Question: {text}", "line 2, column 21: mapping values are not allowed here"),
        ("model: !!python/object:os.system x", "python/object:os.system"),
        ("model: &a [*a]", "the alias *a is not supported"),
        ("model: !!binary aGk=", "binary"),
    ],
)
def test_what_is_no_recipe_is_refused_where_it_goes_wrong(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


def test_a_missing_recipe_names_those_that_are_there(tmp_path):
    write(tmp_path, SMALLEST)
    with pytest.raises(UserError, match=r"no recipe .*recipe\.yml\. Recipes in .*: recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: caf\xe9")
    with pytest.raises(UserError, match=r"not UTF-8 text: .* at byte 10"):
        load_recipe(path)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    assert load(tmp_path, "\ufeff" + SMALLEST).model == "embedded:minilm"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("1e-3", 1e-3), ("1E5", 1e5), ("2.", 2.0), (".5", 0.5), ("-3", -3), ("+.inf", math.inf), ("1.5e+3", 1500.0)],
        *[("no", "no"), ("off", "off"), ("Yes", "Yes"), ("true", True), ("False", False), ("~", None), ("", None)],
        *[("007", "007"), ("1_000", "1_000"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("0x1F", "0x1F")],
        *[("=", "="), ("<<", "<<"), ("'1'", "1"), ("1e", "1e"), ("e5", "e5"), ("1-2", "1-2")],
    ],
)
def test_yaml_is_read_without_its_traps(written, value):
    assert parse(f"key: {written}", "x") == {"key": value}
    assert type(parse(f"key: {written}", "x")["key"]) is type(value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_what_is_dumped_is_parsed_back(value):
    assert parse(dump(value), "x") == value


@given(
    st.sampled_from(
        [
            "no",
            "1e-3",
            "007",
            "null",
            "",
            "1.",
            "true",
            "-",
            "a: b",
            "{text}",
            "#",
            " x ",
            "1_0",
            "~",
            "\x85",
            "a\u2028b",
            "naïve",
            "a\nb",
        ]
    )
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert parse(dump({"label": text}), "x") == {"label": text}


def test_a_saved_recipe_loads_as_itself(tmp_path):
    text = SMALLEST + (
        "technique: [{name: lora, rank: 4, learning_rate: 1e-5}, prefix-tuning]\n"
        "compare: [full, {name: lora, alpha: 3, head_learning_rate: 0.5}]\nseeds: [3, 1]\n"
    )
    recipe = load(tmp_path, text, 'data.label="no"', 'data.template="Q: {text}\\nA:"', "model=1e-3x")
    copy = tmp_path / "elsewhere" / "copy.yaml"
    recipe.save(copy)
    assert load_recipe(copy) == recipe
    assert load_recipe(copy).fingerprint() == recipe.fingerprint()


def test_a_technique_is_a_name_a_mapping_or_a_list_for_one_adapter(tmp_path):
    text = "{name: lora, rank: 4, learning_rate: 1e-4}, [lora, {name: parallel, head_learning_rate: 1}]"
    plain, small, hybrid = load(tmp_path, f"{SMALLEST}compare: [lora, {text}]").compare
    assert plain.methods() == [METHODS["lora"]()]
    assert small.methods() == [METHODS["lora"](rank=4)]  # type: ignore[call-arg]
    assert (small.parts[0].learning_rate, small.head_learning_rate) == (1e-4, None)
    assert hybrid.methods() == [METHODS["lora"](), METHODS["parallel"]()]
    assert (hybrid.name, hybrid.head_learning_rate) == ("lora+parallel", 1.0)
    assert [spec.slug for spec in (plain, small, hybrid)] == [
        "lora",
        "lora-rank-4-learning_rate-0.0001",
        "lora_parallel-head_learning_rate-1.0",
    ]


def test_each_technique_of_an_adapter_has_its_own_rate_and_the_head_one(tmp_path):
    text = "technique: [{name: lora, learning_rate: 1}, {name: parallel, learning_rate: 2}]"
    assert [part.learning_rate for part in load(tmp_path, SMALLEST + text).technique.parts] == [1.0, 2.0]
    text = "technique: [{name: lora, head_learning_rate: 1}, {name: parallel, head_learning_rate: 2}]"
    assert "technique.1.head_learning_rate=2.0 differs from 1.0" in refusal(tmp_path, SMALLEST + text)


@pytest.mark.usefixtures("sparkle")
def test_an_options_type_is_checked_and_only_a_whole_number_for_a_number_is_changed():
    spec = TechniqueSpec.parse({"name": "sparkle", "size": 3, "scale": 2, "spots": ["a", "b"], "start": None})
    assert spec.methods() == [Sparkle(size=3, scale=2.0, spots=("a", "b"))]
    assert TechniqueSpec.parse(spec.written()) == spec


@pytest.mark.usefixtures("sparkle")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "8"}, "size='8' must be a whole number."),
        ({"size": 8.0}, "size=8.0 must be a whole number."),
        ({"size": True}, "size=true must be a whole number."),
        ({"size": 1, "gated": "yes"}, "gated='yes' must be true or false."),
        ({"size": 1, "spots": "a"}, "spots='a' must be a list."),
        ({"size": 1, "spots": [1]}, "spots=[1] must be text"),
        ({"size": 1, "start": 5}, "start=5 must be text: write it in quotes."),
        ({"size": 0}, ": Sparkle's size must be at least 1, got 0."),
    ],
)
def test_an_options_mistake_names_the_option_and_its_value(options, said):
    with pytest.raises(Problems) as error:
        TechniqueSpec.parse({"name": "sparkle", **options})
    assert said in str(error.value)


@pytest.mark.usefixtures("sparkle")
def test_a_slug_is_a_folders_name_and_tells_entries_apart():
    long = [TechniqueSpec.parse({"name": "sparkle", "size": 1, "start": letter * 200}) for letter in "ab"]
    odd = [TechniqueSpec.parse({"name": "sparkle", "size": 1, "start": start}) for start in ("../x", "..%x")]
    slugs = [spec.slug for spec in long + odd]
    assert len(set(slugs)) == 4
    assert all(len(slug) <= 64 and "/" not in slug for slug in slugs)


def test_an_override_is_as_if_written_in_the_file(tmp_path):
    recipe = load(
        tmp_path,
        SMALLEST + "training:\n",
        *("training.epochs=5", "training.learning_rate=1e-3", "technique.rank=4", "compare=[full, lora]"),
        *("compare.1.rank=2", "compare.0.keep_base=true", "seeds=[1, 2]", "data.label=off", "training.patience="),
    )
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.training.patience) == (5, 1e-3, None)
    assert recipe.technique == TechniqueSpec.parse({"name": "lora", "rank": 4})
    assert [spec.slug for spec in recipe.compare] == ["full-keep_base-True", "lora-rank-2"]
    assert (recipe.seeds, recipe.data.label) == ((1, 2), "off")


@pytest.mark.parametrize("template", ["Review {text} #sentiment", "# {text}", "{text} # Answer:"])
def test_an_override_has_no_comments(tmp_path, template):
    assert load(tmp_path, SMALLEST, f"data.template={template}").data.template == template
    assert load(tmp_path, SMALLEST, f'data.template="{template}"').data.template == template


def test_an_override_may_be_json(tmp_path):
    recipe = load(tmp_path, SMALLEST, 'technique={"name": "lora", "rank": 4, "learning_rate": 3.3e-05}')
    assert recipe.technique == TechniqueSpec.parse({"name": "lora", "rank": 4, "learning_rate": 3.3e-5})


def test_the_last_override_wins_and_may_change_what_an_earlier_one_set(tmp_path):
    overrides = ("technique=parallel", "technique.size=4", "training.epochs=1", "training.epochs=2")
    recipe = load(tmp_path, SMALLEST, *overrides)
    assert (recipe.technique.slug, recipe.training.epochs) == ("parallel-size-4", 2)


def test_a_part_of_the_default_comparison_can_be_overridden(tmp_path):
    place = COMPARED.index("lora")
    recipe = load(tmp_path, SMALLEST, f"compare.{place}.rank=2")
    assert [spec.slug for spec in recipe.compare] == [name if name != "lora" else "lora-rank-2" for name in COMPARED]


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ("Question: {text}", "Question: {text}"),
        ("{text}", "{text}"),
        ("{text}: ", "{text}:"),
        ("- {text}", "- {text}"),
        ("@{text}", "@{text}"),
        ('"Q: {text}\\nA:"', "Q: {text}\nA:"),
    ],
)
def test_a_template_needs_no_quotes_of_yaml_on_the_command_line(tmp_path, written, template):
    assert load(tmp_path, SMALLEST, f"data.template={written}").data.template == template


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("training.epoch=5", "training.epoch is no field of a recipe. Did you mean training.epochs?"),
        ("trainin.epochs=5", "trainin is no field of a recipe. Did you mean training?"),
        ("technique.ranks=5", "technique.ranks is no option of lora. Did you mean 'rank'?"),
        ("technique=lroa", "technique='lroa' is no technique. Did you mean 'lora'?"),
        ("compare.99.rank=5", "compare is a list of"),
        ("compare.x=lora", "'x' is none of its entries. Write compare.0 for the first."),
        ("data.train.x=5", "data.train='train.csv' has no fields."),
        ("training.epochs.x=5", "training.epochs={'x': 5} must be a whole number."),
        ("training.epochs", "is not path=value, such as training.epochs=5."),
        ("=5", "is not path=value"),
        ("training..epochs=5", "is not path=value"),
        ("compare=[lora", "--set 'compare=[lora'"),
        ("model='a", '--set "model=\'a"'),
    ],
)
def test_a_wrong_override_is_refused_and_named(tmp_path, assignment, said):
    assert said in refusal(tmp_path, SMALLEST, assignment)


KEYS = st.text("abcdefghij_", min_size=1, max_size=4)


@given(st.lists(KEYS, min_size=1, max_size=4), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False))
def test_an_override_sets_the_value_at_its_path_and_nothing_else(path, value):
    recipe: dict[str, Any] = {"kept": {"x": 1}}
    override(recipe, f"{'.'.join(path)}={json.dumps(value).replace('Infinity', '.inf')}", {})
    for key in path[:-1]:
        assert list(recipe) == ([key] if "kept" not in recipe else ["kept", key])
        recipe = recipe[key]
    assert recipe[path[-1]] == value


CHANGES = [
    *[
        ("training.epochs=9", True),
        ("training.seed=9", True),
        ("data.seed=9", True),
        ("data.label=x", True),
        ("technique.rank=4", True),
    ],
    *[("task=generation", True), ("training.micro_batch_size=1", True), ("training.learning_rate=1", True)],
    *[("output=x", False), ("training.checkpoint_minutes=9", False), ("training.checkpoint_steps=9", False)],
    *[("training.tracker=wandb", False), ("compare=[lora]", False), ("seeds=[5]", False), ("technique.rank=8", False)],
]


@pytest.mark.parametrize(("change", "matters"), CHANGES)
def test_the_fingerprint_changes_exactly_with_what_changes_the_result(tmp_path, change, matters):
    before, after = load(tmp_path, SMALLEST), load(tmp_path, SMALLEST, change)
    assert (before.fingerprint() != after.fingerprint()) == matters
    assert bool(after.changes(before)) == matters


def test_changes_say_what_was_and_what_is(tmp_path):
    before = load(tmp_path, SMALLEST)
    after = load(tmp_path, SMALLEST, "training.epochs=9", "technique=head")
    assert "training.epochs was 3 and is 9" in after.changes(before)
    assert 'technique.methods.0.name was "lora" and is "head"' in after.changes(before)
    assert "technique.methods.0.rank was 8 and is not there" in after.changes(before)


def test_a_recipe_can_be_made_in_python_and_is_checked_the_same(tmp_path, monkeypatch):
    recipe = Recipe(model="m", data={"train": "a.csv"}, compare=["lora", "head"], seeds=[1, 2], output="o")  # type: ignore[arg-type]
    assert [spec.name for spec in recipe.compare] == ["lora", "head"]
    assert (recipe.data.train, recipe.output) == ("a.csv", "o")
    with pytest.raises(ValueError, match="is no technique"):
        Recipe(model="m", data={"train": "a.csv"}, technique="lroa", output="o")  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    assert load_recipe(write(tmp_path, SMALLEST).name).output == os.path.join(tmp_path, "runs", "recipe")  # noqa: PTH118


def test_a_failed_save_leaves_the_old_recipe_whole(tmp_path, monkeypatch):
    recipe = load(tmp_path, SMALLEST)
    path = tmp_path / "out.yaml"
    recipe.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space"):
        recipe.save(path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.yaml", "recipe.yaml"]


def test_a_folder_s_name_does_not_hang_on_the_order_of_options() -> None:
    parts = [Part("lora", options) for options in ({"rank": 4, "targets": "q"}, {"targets": "q", "rank": 4})]
    assert {TechniqueSpec((part,)).slug for part in parts} == {"lora-rank-4-targets-q"}
