"""What ``torch.compile(..., options=...)`` accepts, checked before anything is compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidOption, UnknownOption
from .inductor import inductor_options, mode_options
from .passes.static import check_ranges
from .recipe import Recipe
from .scheme import get_scheme

DEFAULT_SCHEME = "int8dq"
OPTIONS = ("scheme", "recipe", "stats", "smooth", "ranges", "dump_dir", "strict", "inductor")


@dataclass(frozen=True)
class Config:
    """One compile's settings. ``recipe`` is None where the user left the choice to fxquant; stats and
    smooth are ``passes.equalize``'s (smooth False: no such pass), ranges ``passes.quantize_weights``'s."""

    recipe: Recipe | None = None
    stats: Any = None
    smooth: Any = 0.5
    ranges: str = "minmax"
    dump_dir: str | None = None
    strict: bool = False
    inductor: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(options: Mapping[str, Any] | None, mode: str | None = None) -> Config:
        """Raises UnknownOption, InvalidOption, UnknownScheme and InvalidRule."""
        options = dict(options or {})
        for name in options:
            if name not in OPTIONS:
                raise UnknownOption(name=name, known=", ".join(OPTIONS))
        _expect(options, "scheme", str, "the name of a scheme")
        _expect(options, "strict", bool, "True or False")
        _expect(options, "dump_dir", str | os.PathLike, "a folder's path")
        _expect(options, "stats", Mapping, "statistics, as fxquant.calibrate returns them")
        _expect(options, "inductor", Mapping, "a mapping of torch._inductor.config settings")
        if "scheme" in options and "recipe" in options:
            value = (options["scheme"], options["recipe"])
            raise InvalidOption(name="scheme and recipe", value=value, expected="only one of them")
        for name in ("smooth", "ranges"):
            if name in options and "stats" not in options:
                expected = "stats beside it, as fxquant.calibrate returns them"
                raise InvalidOption(name=name, value=options[name], expected=expected)
        check_ranges(options.get("ranges", "minmax"))
        spec = options.get("recipe", options.get("scheme"))
        recipe = None if spec is None else Recipe.of(spec)
        if recipe is not None and "stats" not in options:
            _refuse_static(recipe)
        dump = options.get("dump_dir") or os.environ.get("FXQUANT_DUMP_DIR")
        return Config(
            recipe=recipe,
            stats=options.get("stats"),
            smooth=options.get("smooth", 0.5),
            ranges=options.get("ranges", "minmax"),
            dump_dir=os.fspath(dump) if dump else None,
            strict=options.get("strict", False),
            inductor=mode_options(mode) | _inductor(options.get("inductor", {})),
        )


def _refuse_static(recipe: Recipe) -> None:
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    for name in schemes:
        if get_scheme(name).static:
            expected = (
                "stats beside it, which its activations' scales come from: "
                "stats=fxquant.calibrate(model, batches)"
            )
            raise InvalidOption(name="scheme", value=name, expected=expected)


def _expect(options: dict[str, Any], name: str, kind: Any, expected: str) -> None:
    if name in options and not isinstance(options[name], kind):
        raise InvalidOption(name=name, value=options[name], expected=expected)


def _inductor(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = inductor_options()
    for name in settings:
        if name not in known:
            raise UnknownOption(
                name=f"inductor[{name!r}]", known="the settings of torch._inductor.config"
            )
    return dict(settings)
