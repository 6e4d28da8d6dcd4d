"""Reading a recipe: YAML, overrides, and errors that name value, rule and remedy."""

import difflib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_gdn.config.run import Config
from megatron_gdn.config.types import ConfigError, lower_first


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which by itself would take the last of several equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} is there twice: keep one of them", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file with the sections of `Config`.
        overrides: `section.field=value`, the value in YAML.

    Raises:
        ConfigError: no such file, broken YAML, an unknown key, a value that breaks a rule; all of them at once.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(f"--config ({path}) cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config ({path}) is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config ({path}) must hold sections such as 'model:' and 'training:'.")
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict) -> Config:
    """A Config from nested dictionaries, see `load_config`."""
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from None


def explain(error: ValidationError, what: type) -> str:
    """A line for each wrong value: value, rule, and for an unknown key the near ones.

    Args:
        error: of pydantic.
        what: the section, or the whole configuration, that was validated.
    """
    return "\n".join(_explain(item, what) for item in error.errors())


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives the same run."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _apply_override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    *path, field = key.split(".")
    if not (separator and path and all(path) and field):
        raise ConfigError(f"override ({override!r}) must be section.field=value, such as optimizer.lr=1e-3.")
    for section in path:
        values[section] = values.get(section) or {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"override ({override!r}) names a part of {section}, which has none: see the recipe.")
    try:
        # A pattern may start with "*", which YAML would read as an alias.
        values[field] = text if text.startswith("*") else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override ({override!r}) has a value that is not YAML: {error}") from error


def _explain(error: dict, what: type) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location) or "configuration"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(location[:-1], what)
        near = difflib.get_close_matches(location[-1], known, n=3, cutoff=0.5) or known
        prefix = ".".join(location[:-1])
        names = ", ".join(f"{prefix}.{key}" if prefix else key for key in near)
        return f"{name} is not a known key: did you mean {names}?"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{name} is required: set it in the recipe or as {name}=VALUE."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if not location else f"{name}: {message}"
    if error["type"] == "list_type" and isinstance(error["input"], str):
        message = f"must be a list: write [{error['input']}]"
    return f"{name} ({error['input']!r}): {lower_first(message)}."


def _known_keys(location: list[str], known: Any) -> list[str]:
    for part in location:
        known = next((field.type for field in fields(known) if field.name == part), None)
        if not is_dataclass(known):
            return []
    return [field.name for field in fields(known)]
