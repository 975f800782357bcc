"""Lay out the flat settings of a command in sections, so that `--help` groups its flags."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from fastppo.config import ALIASES, SETTINGS, TYPES, Config, Section, Setting, default_text, shown

_PLACEHOLDERS: dict[object, str] = {
    int: "INT",
    float: "NUMBER",
    bool: "{True,False}",
    str: "TEXT",
    Path: "PATH",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """Base of the nested dataclasses that tyro parses: a command's own flags, then a dataclass per section."""

    def values(self) -> dict[str, Any]:
        """Return the fields of the command that the form was made of."""
        flat: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            flat |= value.values() if isinstance(value, Form) else {field.name: value}
        return flat


def form(command: Config) -> Form:
    """Return the fields of `command` as a form.

    tyro draws a box around the flags of each nested dataclass. Fields without metadata, the command's own, come first.
    """
    texts, values = help_texts(type(command)), {f.name: getattr(command, f.name) for f in dataclasses.fields(command)}
    own: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {section: {} for section in get_args(Section)}
    for name, hint in typing.get_type_hints(type(command), include_extras=True).items():
        plain, *data = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if any(isinstance(item, Setting) for item in data):
            default, fields = default_text(name, values[name]), sections[SETTINGS[name].section]
        else:
            default, fields = shown(values[name]), own
        alias = next((f" Alias: {flag(alias)}." for alias in ALIASES if ALIASES[alias] == name), "")
        argument = tyro.conf.arg(
            help=texts.get(name, "") + alias,
            help_behavior_hint=f"(default: {default})",
            metavar=None if fields is own else placeholder(name) or None,
            prefix_name=fields is own,
        )
        if fields is not own and (spec := _lenient(plain, placeholder(name))) is not None:
            data.append(spec)
        fields[name] = Annotated[plain, argument, *data]  # a command's own annotations win over ours
    for section, fields in sections.items():
        name = section.replace(" ", "_")
        values[name] = _make(name, fields, values)
        own[name] = Annotated[type(values[name]), tyro.conf.arg(name=section)]
    return _make(type(command).__name__, own, values)


def _lenient(hint: object, metavar: str) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Return how to read a setting that is one number, choice, text, path or switch with a value, or a list.

    Text that is none of these goes to `Config` as it is, whose messages are one line and name valid values. None for
    other settings: switches without a value, and those with functions of their own.
    """
    if get_origin(hint) is tuple:
        of = _lenient(get_args(hint)[0], "")
        assert of is not None, "lists hold numbers, choices or text"
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar=metavar,
            instance_from_str=lambda arguments: tuple(of.instance_from_str([text]) for text in arguments),
            is_instance=lambda _: True,
            str_from_instance=lambda value: list(map(str, value)),
        )
    union = get_origin(hint) in (types.UnionType, typing.Union)
    options = set(get_args(hint)) if union else {hint}
    kinds = (int, float, str, Path, types.NoneType, *((bool,) if union else ()))
    if not all(x in kinds or get_origin(x) is Literal for x in options):
        return None
    numbers = [kind for kind in (int, float) if kind in options] + ([float] if int in options else [])

    def read(text: str) -> object:
        if text == "None" and types.NoneType in options:
            return None
        if bool in options and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in numbers:
            with contextlib.suppress(ValueError):
                return kind(text)
        return Path(text) if Path in options else text

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: read(arguments[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def _make(name: str, fields: dict[str, Any], values: dict[str, Any]) -> Form:
    kind = dataclasses.make_dataclass(name, fields.items(), bases=(Form,), namespace={"__doc__": ""}, frozen=True)
    made: Form = kind(**{field: values[field] for field in fields})
    return made


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def placeholder(name: str) -> str:
    """Return the placeholder of a setting's value in the help text; empty for a flag without value."""
    setting, hint = SETTINGS[name], TYPES[name]
    if setting.scheduled:
        return "NUMBER|SCHEDULE"
    return setting.unit or ("" if hint is bool else _placeholder(hint))


def _placeholder(hint: object) -> str:
    args = [arg for arg in get_args(hint) if arg is not types.NoneType]
    if get_origin(hint) is Literal:
        return f"{{{','.join(args)}}}"
    if get_origin(hint) is tuple:
        return f"[{_placeholder(args[0])} ...]"
    return _placeholder(args[0]) if args else _PLACEHOLDERS[hint]


def help_texts(kind: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass, by field; those of a subclass win."""
    bases = reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)])
    return {name: text for base in bases for name, text in _own_help_texts(base).items()}


@functools.cache  # reading the source takes 20 ms, and every command shares Config's
def _own_help_texts(kind: type) -> dict[str, str]:
    texts: dict[str, str] = {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in itertools.pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts
