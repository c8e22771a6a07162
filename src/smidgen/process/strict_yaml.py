"""YAML without its traps: a key given twice is an error, `no` is text, and 1e-3 is a number.

PyYAML reads YAML 1.1, in which `no`, `off` and `on` are booleans, 1e-3 is text, 1:30 is ninety, and the last of two
equal keys wins. Here a recipe holds what JSON can hold, read by the rules of YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from smidgen.errors import UserError

SCALARS = {  # tag: (what it looks like, the characters it may start with)
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),  # 007 is text: an id keeps its zeros
    "float": (
        r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = cast(Any, self).peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not supported: write the value again", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                complaint = f"the key {key!r} is not text: write it in quotes"
            elif key in seen:
                complaint = f"the key {key!r} is given twice"
            else:
                seen.add(key)
                continue
            raise yaml.constructor.ConstructorError(None, None, complaint, key_node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        folded = any(character in data for character in "\x85\u2028\u2029")  # PyYAML would turn them into spaces
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if folded else None)


_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_Dumper.add_representer(str, _Dumper.represent_str)
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in SCALARS.items():
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str, source: str) -> Any:
    """The value that `text` holds: dicts with text keys, lists, text, numbers, booleans and None.

    Raises:
        UserError: the text is not YAML or a key is given twice; names `source`, the line and the column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = ": text that holds ': ' belongs in quotes" if "mapping values" in str(error.problem) else ""
        raise UserError(f"{source}{where}: {error.problem}{hint}.") from error
    except RecursionError as error:
        raise UserError(f"{source} holds lists or mappings inside each other beyond what can be read.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}.") from error


def dump(data: Any) -> str:
    """The YAML that `parse` reads back as `data`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
