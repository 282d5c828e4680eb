"""Which layer gets which scheme: frozen rules, the first match wins, unused ones are reported."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import InvalidOption, InvalidRule, UnusedRule
from .graph import Layer
from .scheme import get_scheme

EXPECTED = "a scheme, a mapping of name patterns to schemes, or a list of rules"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A layer matches when every condition that is given holds.

    name: a glob, or a regular expression after ``re:``, for the whole layer name.
    module_type: class name ("Linear") or qualified name, glob or ``re:``.
    in_features: exact value, or (min, max), both inclusive, ``None`` for no limit.
    scheme: a scheme's name or alias; ``None`` keeps the layer float.
    """

    scheme: str | None
    name: str = "*"
    module_type: str = "*"
    in_features: int | tuple[int | None, int | None] | None = None

    def matches(self, layer: Layer) -> bool:
        if not _match(self.name, layer.name):
            return False
        short = layer.module_type.rpartition(".")[2]
        if not (_match(self.module_type, layer.module_type) or _match(self.module_type, short)):
            return False
        if self.in_features is None:
            return True
        if isinstance(self.in_features, int):
            return layer.in_features == self.in_features
        low, high = self.in_features
        return (low is None or layer.in_features >= low) and (
            high is None or layer.in_features <= high
        )


def _match(pattern: str, text: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], text) is not None
    return fnmatch.fnmatchcase(text, pattern)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules. ``Recipe.of`` takes a scheme's name, a mapping of patterns, or rules."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for index, rule in enumerate(self.rules):
            _validate(index, rule)

    @staticmethod
    def of(spec: Recipe | str | Mapping[str, str | None] | Sequence[Any]) -> Recipe:
        """A recipe from ``"int8dq"``, ``{"*.head": None, "*": "int8dq"}`` or a list of rules.

        Raises UnknownScheme, InvalidRule, and InvalidOption for anything else.
        """
        if isinstance(spec, Recipe):
            return spec
        if isinstance(spec, str):
            return Recipe((Rule(scheme=spec),))
        if isinstance(spec, Mapping):
            return Recipe(tuple(Rule(name=k, scheme=v) for k, v in spec.items()))
        if not isinstance(spec, Sequence):
            raise InvalidOption(name="recipe", value=spec, expected=EXPECTED)
        return Recipe(tuple(_rule(i, r) for i, r in enumerate(spec)))

    def rule_for(self, layer: Layer) -> Rule | None:
        """The first rule that matches."""
        return next((rule for rule in self.rules if rule.matches(layer)), None)

    def unused(self, layers: Sequence[Layer]) -> list[Rule]:
        """The rules that decide no layer; the last, if it matches everything, may stay idle."""
        used = {id(rule) for layer in layers if (rule := self.rule_for(layer))}
        default = {"name": "*", "module_type": "*", "in_features": None}
        return [
            rule
            for rule in self.rules
            if id(rule) not in used and {k: getattr(rule, k) for k in default} != default
        ]

    def check_used(self, layers: Sequence[Layer]) -> None:
        """Raises UnusedRule, which lists the layers there are."""
        if unused := self.unused(layers):
            names = ", ".join(sorted(layer.name for layer in layers)) or "none"
            raise UnusedRule(rules=", ".join(map(str, unused)), layers=names)

    @property
    def by_name(self) -> bool:
        """Can two layers of equal shape and type get different schemes?"""
        return any(rule.name != "*" for rule in self.rules)

    def to_json(self) -> str:
        return json.dumps([asdict(rule) for rule in self.rules])

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Inverse of ``to_json``. Raises InvalidRule on unknown keys, InvalidOption on no JSON."""
        try:
            return Recipe.of(json.loads(text))
        except json.JSONDecodeError as error:
            expected = f"JSON of {EXPECTED} ({error})"
            raise InvalidOption(name="recipe", value=text, expected=expected) from None


def _rule(index: int, spec: Any) -> Rule:
    if isinstance(spec, Rule):
        return spec
    if not isinstance(spec, Mapping):
        raise InvalidRule(index=index, rule=spec, reason="expected a Rule or a mapping")
    known = set(Rule.__dataclass_fields__)
    if unknown := sorted(set(spec) - known):
        reason = f"unknown key {unknown[0]!r}; the keys are: {', '.join(sorted(known))}"
        raise InvalidRule(index=index, rule=dict(spec), reason=reason)
    if "scheme" not in spec:
        raise InvalidRule(index=index, rule=dict(spec), reason="a scheme (or None) is missing")
    fields = dict(spec)
    if isinstance(fields.get("in_features"), list):
        fields["in_features"] = tuple(fields["in_features"])
    return Rule(**fields)


def _validate(index: int, rule: Rule) -> None:
    if rule.scheme is not None:
        get_scheme(rule.scheme)
    for key in ("name", "module_type"):
        pattern = getattr(rule, key)
        if not isinstance(pattern, str):
            raise InvalidRule(index=index, rule=rule, reason=f"{key} is not a string")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise InvalidRule(index=index, rule=rule, reason=f"{key}: {error}") from None
    size = rule.in_features
    pair = isinstance(size, tuple) and len(size) == 2
    pair = pair and all(s is None or isinstance(s, int) for s in size)  # type: ignore[union-attr]
    if not (size is None or isinstance(size, int) or pair):
        raise InvalidRule(index=index, rule=rule, reason="in_features is a number or (min, max)")
