"""Settings that carry their guards, ``fr_jax.experiments._fields``."""

import dataclasses

import pytest

from fr_jax.experiments._fields import SettingsError, check_fields, documented, own_fields, own_setting, setting


@documented
@dataclasses.dataclass(frozen=True)
class Made:
    """Made up."""

    rate: float | None = setting(None, above=0, most=1, help="A rate.")
    share: float = setting(0.0, least=0, below=1)
    kind: str = setting("a", choices=("a", "bcd"))
    sizes: tuple[int, ...] = setting((1, 2), least=1, series="increasing")
    names: tuple[str, ...] = setting(("a",), choices=("a", "bcd"), series="distinct")
    free: float = float("inf")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rate": 0}, "--rate 0 is out of range; it must be above 0 and at most 1."),
        ({"rate": 1.5}, "--rate 1.5 is out of range"),
        ({"rate": float("nan")}, "--rate nan is out of range; it must be above 0 and at most 1, and finite."),
        ({"share": 1.0}, "--share 1.0 is out of range; it must be at least 0 and below 1."),
        ({"kind": "bcde"}, "--kind bcde is unknown; it can be a, bcd. Did you mean bcd?"),
        ({"sizes": (0, 1)}, "--sizes 0 1 is out of range; each must be at least 1."),
        ({"sizes": (2, 1)}, "--sizes 2 1: give one or more increasing values, each at least 1."),
        ({"sizes": ()}, "--sizes none: give one or more increasing values"),
        ({"names": ("a", "a")}, "--names a a: give one or more distinct values."),
        ({"names": ("a", "b")}, "--names b is unknown"),
    ],
)
def test_one_loop_checks_every_guard(change, complaint):
    check_fields(Made())
    check_fields(Made(rate=1.0, share=0.99, sizes=(1,), names=("bcd", "a")))
    with pytest.raises(SettingsError) as error:
        check_fields(Made(**change))
    assert complaint in str(error.value)


def test_help_of_a_field_is_in_the_docstring():
    assert Made.__doc__.splitlines()[-1] == "  rate: A rate."


def test_own_settings_of_several_cards():
    parts, flag = own_setting("parts", int, "Parts.", least=1), own_setting("flag", bool, "On.")
    fields = own_fields({"x": {parts: 1}, "y": {parts: 4, flag: False}, "z": {}})
    made = dataclasses.make_dataclass("Made", fields)
    assert made() == made(parts=None, flag=False)
    helps = {field.name: field.metadata["guard"].help for field in dataclasses.fields(made)}
    assert helps == {"parts": "[x, y] Parts. Default: 1 (x), 4 (y).", "flag": "[y] On."}
    with pytest.raises(SettingsError, match="--parts 0 is out of range"):
        check_fields(made(parts=0))
