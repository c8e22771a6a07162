"""`--set training.epochs=5`: a value given on the command line, as if it were written in the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from smidgen.errors import UserError
from smidgen.process.problems import shown
from smidgen.process.strict_yaml import parse


def override(recipe: dict[str, Any], assignment: str, defaults: Mapping[str, Any]) -> None:
    """Sets one field of a recipe that is not validated yet, in place.

    Args:
        recipe: the recipe's YAML.
        assignment: path=value, such as training.epochs=5, technique.rank=4, compare=[full, lora] or compare.0.rank=4.
            The value is read as YAML, but a value that is no list in [...] and no mapping in {...} is text even where
            a file would need quotes, as in data.template="Question: {text}".
        defaults: what stands in the fields that the recipe leaves out and the assignment may change a part of.

    Raises:
        UserError: the assignment has no "=", its value is not YAML, or its path leads into a value without parts.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {shown(assignment)} is not path=value, such as training.epochs=5.")
    if len(keys) > 1 and recipe.get(keys[0]) is None:
        recipe[keys[0]] = defaults.get(keys[0], {})
    node: Any = recipe
    for depth in range(1, len(keys)):
        node = _enter(node, keys[:depth], assignment)
    node[_index(node, keys, assignment)] = _value(text, assignment)


def _enter(node: Any, path: list[str], assignment: str) -> Any:
    """The dict or list at the end of `path`, of which `node` is the one before; an absent section is made."""
    index = _index(node, path, assignment)
    inner = node.get(index) if isinstance(node, dict) else node[index]
    if isinstance(inner, str) and path[0] in ("technique", "compare"):
        inner = {"name": inner}
    node[index] = {} if inner is None else inner
    if not isinstance(node[index], dict | list):
        raise UserError(f"--set {shown(assignment)}: {'.'.join(path)}={shown(inner)} has no fields.")
    return node[index]


def _index(node: dict[str, Any] | list[Any], path: list[str], assignment: str) -> Any:
    """The last key of `path`, as a number where `node` is a list."""
    *above, key = path
    if isinstance(node, dict):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        where = ".".join(above)
        raise UserError(
            f"--set {shown(assignment)}: {where} is a list of {len(node)}, and {key!r} is none of its entries. "
            f"Write {where}.0 for the first."
        )
    return int(key)


def _value(text: str, assignment: str) -> Any:
    flow = text.strip() == "{}" or re.match(r"\s*(\[|\{\s*[\"']?[\w-]+[\"']?\s*:)", text)
    quoted = text.lstrip().startswith(('"', "'"))
    if not flow and not quoted and re.search(r"(^|\s)#", text):
        return text.strip()  # in a file it would be a comment
    try:
        value = parse(text, f"--set {shown(assignment)}")
    except UserError:
        if flow or quoted:
            raise
        return text.strip()
    return value if flow or not isinstance(value, dict | list) else text.strip()
