"""A setting of a program: a dataclass field that carries its guards, and the one loop that checks them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

__all__ = [
    "Guard",
    "Own",
    "SettingsError",
    "check_fields",
    "choice",
    "documented",
    "flag",
    "guard",
    "own_fields",
    "own_setting",
    "setting",
    "text",
]

LARGEST_SEED = 2**32 - 1  # jax.random.key silently maps larger ones to others
T = TypeVar("T")


class SettingsError(ValueError):
    """A setting that cannot be used; the message says what was given, what is valid and what to do."""


class Guard(NamedTuple):
    """What guards a setting. Of a tuple, bounds and choices hold for every value.

    Attributes:
      least, above, most, below: bounds of a number; with any of them it must also be finite.
      choices: all valid values, if they can be listed.
      series: of a tuple, where it is not None: one or more ``"distinct"``, or ``"increasing"``, values.
      free: ``""`` if the value enters the mathematics of a step; ``"resume"`` if it may differ when a run is resumed;
        ``"process"`` if it may also differ between the processes of a run.
      vary: whether ``compare --vary`` can go through its values.
      owners: the methods or models it belongs to; empty for all.
      help: its text in ``--help``, where that is not the string below the field.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    series: Literal["", "distinct", "increasing"] = ""
    free: Literal["", "resume", "process"] = ""
    vary: bool = True
    owners: tuple[str, ...] = ()
    help: str = ""

    @property
    def bounds(self) -> str:
        """Such as ``at least 0 and below 1``; empty without bounds."""
        named = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {value}" for name, value in named.items() if value is not None)

    def holds(self, number: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
            and (not self.bounds or math.isfinite(number))
        )


def setting(default: Any, **guards: Any) -> Any:
    """A dataclass field with this default and the guards of :class:`Guard`.

    Example:
      >>> import dataclasses
      >>> from fr_jax.experiments._fields import check_fields, setting
      >>> @dataclasses.dataclass(frozen=True)
      ... class Settings:
      ...     K: int = setting(4, least=1)
      >>> check_fields(Settings(K=0))
      Traceback (most recent call last):
      ...
      fr_jax.experiments._fields.SettingsError: --K 0 is out of range; it must be at least 1.
    """
    return dataclasses.field(default=default, metadata={"guard": Guard(**guards)})


def guard(field: dataclasses.Field) -> Guard:
    """The guards of a field; none where it was not made by :func:`setting`."""
    return field.metadata.get("guard", Guard())


class Own(NamedTuple):
    """A setting that belongs to some methods or models, whose cards give its default.

    Attributes:
      name: the field's.
      type: of a value.
      guard: of it.
    """

    name: str
    type: type
    guard: Guard


def own_setting(name: str, type: type, help: str, **guards: Any) -> Own:
    """Declares a setting of single methods or models; the guards are those of :class:`Guard`."""
    return Own(name, type, Guard(help=help, **guards))


def own_fields(cards: Mapping[str, Mapping[Own, Any]]) -> list[tuple[str, Any, Any]]:
    """The own settings of all cards (name -> setting -> default) as fields for ``dataclasses.make_dataclass``.

    A field that is not given is None, or False for a flag. Its help names the owners and their defaults.
    """
    owners: dict[Own, dict[str, Any]] = {}
    for name, settings in cards.items():
        for one, default in settings.items():
            owners.setdefault(one, {})[name] = default
    fields = []
    for one, defaults in owners.items():
        values = {f"{default:g}" if isinstance(default, float) else str(default) for default in defaults.values()}
        shown = values.pop() if len(values) == 1 else ", ".join(f"{value} ({name})" for name, value in defaults.items())
        known = one.type is not bool and {*defaults.values()} != {None}
        help = f"[{', '.join(defaults)}] {one.guard.help}" + (f" Default: {shown}." if known else "")
        guards = one.guard._replace(owners=tuple(defaults), help=help)._asdict()
        if one.type is bool:
            fields.append((one.name, bool, setting(False, **guards)))
        else:
            fields.append((one.name, one.type | None, setting(None, **guards)))
    return fields


def documented(settings: type[T]) -> type[T]:
    """Adds the help that fields carry to the docstring of their class, where tyro looks for it."""
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(settings)  # type: ignore[arg-type]
    lines = [f"  {field.name}: {guard(field).help}" for field in fields if guard(field).help]
    settings.__doc__ = "\n".join([f"{settings.__doc__}\n\nAttributes:", *lines])
    return settings


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass by its own guards.

    Raises:
      SettingsError: for the first value that is out of bounds, or not one of the choices.
    """
    for field in dataclasses.fields(settings):
        guards, value = guard(field), getattr(settings, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if guards.choices and one is not None:
                choice(field.name, one, guards.choices)
            elif isinstance(one, int | float) and not guards.holds(one):
                each = "each" if isinstance(value, tuple) else "it"
                finite = "" if math.isfinite(one) else ", and finite"
                raise SettingsError(
                    f"{flag(field.name)} {text(value)} is out of range; {each} must be {guards.bounds}{finite}."
                )
        if guards.series and value is not None and not _is_series(value, guards.series):
            each = f", each {guards.bounds}" if guards.bounds else ""
            raise SettingsError(f"{flag(field.name)} {text(value)}: give one or more {guards.series} values{each}.")


def _is_series(values: Sequence[Any], kind: str) -> bool:
    ordered = values if kind == "distinct" else sorted(values)
    return bool(values) and list(dict.fromkeys(ordered)) == list(values)


def choice(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises SettingsError if ``value`` is not one of those that ``--name`` can have."""
    valid = tuple(valid)
    if value not in valid:
        close = sorted(difflib.get_close_matches(str(value), valid), key=lambda one: one[0] != value[0])
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingsError(f"{flag(name)} {value} is unknown; it can be {', '.join(valid)}.{hint}")


def flag(name: str) -> str:
    """``data_dir`` -> ``--data-dir``."""
    return f"--{name.removeprefix('resolved_').replace('_', '-')}"


def text(value: Any) -> str:
    """A value as it stands on a command line."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
