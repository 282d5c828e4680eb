"""What ``torch.compile(..., options=...)`` accepts, checked before anything is compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidOption, UnknownOption
from .inductor import inductor_options, mode_options
from .recipe import Recipe

DEFAULT_SCHEME = "int8dq"
OPTIONS = ("scheme", "recipe", "stats", "smooth", "dump_dir", "strict", "inductor")


@dataclass(frozen=True)
class Config:
    """One compile's settings. ``recipe`` is None where the user left the choice to fxquant; stats and
    smooth are ``passes.equalize``'s."""

    recipe: Recipe | None = None
    stats: Any = None
    smooth: Any = 0.5
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
        if "smooth" in options and "stats" not in options:
            expected = "stats beside it, as fxquant.calibrate returns them"
            raise InvalidOption(name="smooth", value=options["smooth"], expected=expected)
        spec = options.get("recipe", options.get("scheme"))
        dump = options.get("dump_dir") or os.environ.get("FXQUANT_DUMP_DIR")
        return Config(
            recipe=None if spec is None else Recipe.of(spec),
            stats=options.get("stats"),
            smooth=options.get("smooth", 0.5),
            dump_dir=os.fspath(dump) if dump else None,
            strict=options.get("strict", False),
            inductor=mode_options(mode) | _inductor(options.get("inductor", {})),
        )


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
