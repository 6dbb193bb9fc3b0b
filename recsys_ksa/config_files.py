"""Typed configuration from files: frozen pydantic models, one TOML file, `a.b=value` overrides. Torch-free.

Unknown keys are refused by their path. Code receives these objects and never reads files itself.
"""

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys_ksa.errors import ConfigError


class Strict(BaseModel):
    """A frozen model that refuses unknown keys; the string under a field says what it is, to who reads the source."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Config = TypeVar("Config", bound=Strict)


def load_config(kind: type[Config], path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, or none, as `kind`, with overrides such as `train.learning_rate=1e-3` applied.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, a value is wrong; the path is quoted.
    """
    try:
        values = {} if path is None else tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a TOML file, got {error.strerror}. Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, got: {error}. Mend the file.") from error
    for override in overrides:
        _apply_override(values, override)
    return parse_config(kind, values, "--set" if path is None else str(path))


def parse_config(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """Check `values` as `kind`; `source` names them in errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        if first["type"] == "extra_forbidden":
            *parents, key = first["loc"]
            keys = _keys(kind, parents)
            near = get_close_matches(str(key), keys, 1)
            advice = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(keys) or 'none'}."
            raise ConfigError(f"{source}: {where}: expected a key that there is, got {key!r}. {advice}") from error
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{source}: {where}: {first['msg']}{got}{more}. Mend this key.") from error


def dump_config(config: Strict) -> str:
    """Return the config as TOML; unset (None) values are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _keys(kind: type[BaseModel], parents: Sequence[int | str]) -> list[str]:
    """Return the keys of the table that `parents` lead to; none where it is of no one kind."""
    for parent in parents:
        field = kind.model_fields.get(str(parent))
        inner = None if field is None else field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return [field.alias or name for name, field in kind.model_fields.items()]


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected a.b=value. Write for example train.max_steps=10.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    table = values
    for parent in parents:
        inner: Any = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, expected a table. Check the key.")
        table = cast("dict[str, Any]", inner)
    table[last] = value
