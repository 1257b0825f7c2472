"""Config base and YAML loading: what is accepted, and what each refusal says."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from tml.config import (
    Config,
    ConfigError,
    apply_override,
    build_config,
    load_config,
    merge,
    parse_yaml,
    to_yaml,
)


class Inner(Config):
    size: int
    note: str | None = None


class Outer(Config):
    exactly_one_of: ClassVar = (("a", "b"),)
    at_most_one_of: ClassVar = (("c", "d"),)

    a: Inner | None = None
    b: Inner | None = None
    c: int | None = None
    d: int | None = None
    items: list[Inner] = Field(default=[])
    rate: float = 1.0


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(folder, text), overrides)
    return str(caught.value)


def test_yaml_with_anchors_merge_keys_and_variables_becomes_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TML_TEST_NAME", "x")
    text = (
        "a: &base {size: 3, note: 'is ${TML_TEST_NAME} and $${NOT} in ${HERE}'}\n"
        "items: [{<<: *base, size: 4}]\nrate: 1e-4\n"
    )
    config = load_config(Outer, write(tmp_path, text))
    assert config.a == Inner(size=3, note=f"is x and ${{NOT}} in {tmp_path}")
    assert config.items[0].size == 4
    assert config.rate == 1e-4


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = Outer(a=Inner(size=1, note="costs $5 and ${HOME}"), items=[Inner(size=2)])
    assert load_config(Outer, write(tmp_path, to_yaml(config))) == config


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a: {size: 1}\nitems: [{size: 1, nota: 2}]")
    assert "items.0.nota: unknown key; did you mean note?" in message
    assert "note, size" in message


def test_a_wrong_value_is_named_with_its_path(tmp_path: Path) -> None:
    assert "a.size" in (message := refusal(tmp_path, "a: {size: many}"))
    assert "'many'" in message


def test_groups_are_enforced(tmp_path: Path) -> None:
    assert "exactly one of a, b; set: a, b" in refusal(tmp_path, "a: {size: 1}\nb: {size: 1}")
    assert "exactly one of a, b; set: none" in refusal(tmp_path, "rate: 1")
    assert "at most one of c, d" in refusal(tmp_path, "a: {size: 1}\nc: 1\nd: 1")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert "'rate' is given twice" in refusal(tmp_path, "a: {size: 1}\nrate: 1\nrate: 2")


def test_an_unset_variable_is_named_with_its_key(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a: {size: 1, note: '${TML_TEST_ABSENT}/x'}")
    assert "a.note" in message
    assert "TML_TEST_ABSENT" in message


def test_a_missing_file_and_broken_yaml_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file"):
        load_config(Outer, tmp_path / "absent.yaml")
    assert "not valid YAML" in refusal(tmp_path, "a: {size: 1")
    assert "must be a mapping, not list" in refusal(tmp_path, "[1, 2]")


def test_overrides_reach_into_lists_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a: {size: 1}\nitems: [{size: 1}, {size: 2}]")
    config = load_config(Outer, path, ["items.1.size=7", "rate=0.5"])
    assert (config.items[1].size, config.rate) == (7, 0.5)
    text = path.read_text()
    assert "unknown key" in refusal(tmp_path, text, "items.1.sise=7")
    assert "not an index from 0 to 1" in refusal(tmp_path, text, "items.2.size=7")
    assert "path.to.key=value" in refusal(tmp_path, text, "rate")
    with pytest.raises(ConfigError, match="a is the value 1, not a mapping"):
        apply_override({"a": 1}, "a.b=2")


def test_merging_goes_by_key_and_lists_of_named_things_by_name() -> None:
    under = parse_yaml("m: {x: 1, y: [1]}\nt: [{name: u, n: 3}, {name: v, n: 4}]", "under")
    over = parse_yaml("m: {y: [2]}\nt: [{name: v, d: 8}]", "over")
    assert merge(under, over) == {
        "m": {"x": 1, "y": [2]},
        "t": [{"name": "u", "n": 3}, {"name": "v", "n": 4, "d": 8}],
    }


def test_paths_below_home_are_written_so_that_they_hold_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paths(Config):
        inside: str
        outside: str

    monkeypatch.setenv("HOME", "/home/me")
    config = Paths(inside="/home/me/tmp/a$b", outside="/home/meadow/x")
    text = to_yaml(config)
    assert "inside: ${HOME}/tmp/a$$b" in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_config(Paths, path) == config
    monkeypatch.setenv("HOME", "/root")
    assert load_config(Paths, path).inside == "/root/tmp/a$b"


def test_an_unknown_key_below_a_name_of_a_mapping_is_told_what_is_known_there() -> None:
    class Item(Config):
        width: int = 1

    class Whole(Config):
        items: dict[str, Item]

    with pytest.raises(ConfigError, match=r"items\.a\.widht: unknown key; did you mean width"):
        build_config(Whole, {"items": {"a": {"widht": 2}}}, "test")
