"""Configuration: the frozen base class of every config, and YAML → config.

`load_config(ConfigClass, path, overrides=())` reads YAML (anchors and merge keys work, a key given
twice does not), replaces `${NAME}` by environment variables and `${HERE}` by the folder of the file
itself, applies `a.b.0.c=value` overrides and validates. Every way this can go wrong is a
`ConfigError` of one paragraph: the file, the path of the key, the value, what is allowed.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tml.machines import environment


class ConfigError(ValueError):
    """A config that its author has to mend; the message says what, where and how."""


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, defaults checked like given values.

    Subclasses may name groups of fields of which exactly one, or at most one, is set (not None).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )

    exactly_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()
    at_most_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        for group in self.exactly_one_of:
            given = self._given(group)
            if len(given) != 1:
                raise ValueError(f"set exactly one of {', '.join(group)}; set: {_names(given)}")
        for group in self.at_most_one_of:
            given = self._given(group)
            if len(given) > 1:
                raise ValueError(f"set at most one of {', '.join(group)}; set: {_names(given)}")
        return self

    def _given(self, group: Sequence[str]) -> list[str]:
        return [name for name in group if getattr(self, name) is not None]


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(
    config_class: type[ConfigT],
    path: str | Path,
    overrides: Iterable[str] = (),
    base: str | Path | None = None,
) -> ConfigT:
    """Read the YAML file `path` as a `config_class`; `overrides` are `a.b=value` strings, applied
    in order.

    base: a YAML file whose values `path` is merged over (`merge`), such as the facts of a data set.
    Raises ConfigError for everything that the config's author can mend.
    """
    tree = read_yaml(path)
    if base is not None:
        tree = merge(read_yaml(base), tree)
    for override in overrides:
        apply_override(tree, override)
    return build_config(config_class, tree, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The YAML file `path` as nested dictionaries and lists; `${HERE}` in it is its own folder."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config {path} cannot be read: {reason}") from error
    return parse_yaml(text, str(path), here=path.absolute().parent)


def merge(under: Any, over: Any) -> Any:
    """`over` laid upon `under`: mappings key by key, lists of mappings with a `name` by that name,
    else `over`.
    """
    if isinstance(under, dict) and isinstance(over, dict):
        merged = dict(under)
        for key, value in over.items():
            merged[key] = merge(under[key], value) if key in under else value
        return merged
    if _is_named_list(under) and _is_named_list(over):
        by_name = {item["name"]: item for item in under}
        for item in over:
            by_name[item["name"]] = merge(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return over


def _is_named_list(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in value
    )


def parse_yaml(text: str, source: str, here: Path | None = None) -> dict[str, Any]:
    """YAML text → nested dictionaries and lists, `${NAME}` replaced. `source` names the text in
    errors.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {source} is not valid YAML: {_one_line(error)}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {source} must be a mapping, not {type(tree).__name__}")
    replaced = _replace_variables(tree, source, (), here)
    assert isinstance(replaced, dict)
    return replaced


def build_config(config_class: type[ConfigT], tree: dict[str, Any], source: str) -> ConfigT:
    """Validate nested dictionaries as a `config_class`; all faults are reported at once."""
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(config_class, fault) for fault in error.errors()]
        raise ConfigError(f"config {source}:\n  " + "\n  ".join(lines)) from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value in place: `model.embeddings.tables.0.num_embeddings=100`; the value is YAML."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: write it as path.to.key=value")
    try:
        value = _replace_variables(yaml.load(text, Loader=_Loader), "--set", tuple(parts), None)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {_one_line(error)}") from error
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                raise ConfigError(
                    f"--set {override}: {where} is a list of {len(node)}; "
                    f"{part!r} is not an index from 0 to {len(node) - 1}"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(index) is None:
                node[index] = {}
        else:
            where = ".".join(parts[:depth])
            raise ConfigError(f"--set {override}: {where} is the value {node!r}, not a mapping")
        if last:
            node[index] = value
        else:
            node = node[index]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config.

    Paths below the caller's home are written with `${HOME}`, which is another folder in a container
    with the same files.
    """
    # "$" of values is written as "$$": what was replaced once must not be replaced again.
    tree = _escape(config.model_dump(mode="json"), f"{environment.home()}/")
    return yaml.safe_dump(tree, sort_keys=False, width=100)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _replace_variables(value: Any, source: str, path: tuple[str, ...], here: Path | None) -> Any:
    if isinstance(value, dict):
        return {
            key: _replace_variables(item, source, (*path, str(key)), here)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            _replace_variables(item, source, (*path, str(index)), here)
            for index, item in enumerate(value)
        ]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return "$"
        if name == "HERE" and here is not None:
            return str(here)
        found = environment.get(name)
        if found is None:
            raise ConfigError(
                f"config {source}: {'.'.join(path)}: the environment variable {name} of {value!r} "
                "is not set; set it or write the value out"
            )
        return found

    return _VARIABLE.sub(variable, value)


def _escape(value: Any, home: str) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item, home) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item, home) for item in value]
    if not isinstance(value, str):
        return value
    below_home = value.startswith(home)
    escaped = (
        value.removeprefix(home).replace("$", "$$") if below_home else value.replace("$", "$$")
    )
    return f"${{HOME}}/{escaped}" if below_home else escaped


def _explain(config_class: type[Config], fault: Any) -> str:
    """One line for one pydantic fault: path, what is wrong, the value, the remedy."""
    location = ".".join(str(part) for part in fault["loc"]) or "(top level)"
    if fault["type"] == "extra_forbidden":
        allowed = _fields_at(config_class, fault["loc"][:-1])
        close = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{location}: unknown key; {hint}known here: {', '.join(sorted(allowed))}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{location}: is missing; set it"
    if isinstance(fault["input"], dict | list | Config):
        return f"{location}: {message}"
    return f"{location}: {message}; the value is {fault['input']!r}"


def _fields_at(config_class: type[Config], location: Sequence[Any]) -> list[str]:
    """The field names of the config class found by walking `location` from `config_class`."""
    current = config_class
    is_key = False
    for part in location:
        if isinstance(part, int) or is_key:  # an item of a list, a key of a mapping of configs
            is_key = False
            continue
        field = current.model_fields.get(str(part))
        found = _config_in(field.annotation) if field else None
        if field is None or found is None:
            return []
        is_key = _is_mapping(field.annotation)
        current = found
    return list(current.model_fields)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(_is_mapping(a) for a in get_args(annotation))


def _config_in(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    for argument in get_args(annotation):
        if (found := _config_in(argument)) is not None:
            return found
    return None


def _names(given: Sequence[str]) -> str:
    return ", ".join(given) or "none"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
