"""What changed between two descriptions of the API, and whether clients of the old one break.

Clients break where a path or a field they use is gone, a type or value they send is no longer taken, something they do
not send is required, or an answer holds a type or value they do not know, or lacks a field that was always there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One difference, in words."""

    what: str
    breaks: bool


def changes(old: Json, new: Json) -> list[Change]:
    """Return how `new` differs from `old`, both OpenAPI documents as `openapi.py` writes them."""
    found = list(_operations(old, new))
    sent, told = _schemas(old, _sent), _schemas(old, _told)
    before, after = old["components"]["schemas"], new["components"]["schemas"]
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            found.append(Change(f"schema {name} is gone", False))  # what used it says whether that breaks
        elif name not in before:
            found.append(Change(f"schema {name} is new", False))
        else:
            found += _schema(name, before[name], after[name], name in sent, name in told)
    if not found and old != new:
        found.append(Change("texts or the version", False))
    return found


def _operations(old: Json, new: Json) -> Iterator[Change]:
    def named(document: Json) -> dict[str, Json]:
        return {f"{method.upper()} {path}": op for path, ops in document["paths"].items() for method, op in ops.items()}

    before, after = named(old), named(new)
    yield from (Change(f"{name} is gone", True) for name in before if name not in after)
    yield from (Change(f"{name} is new", False) for name in after if name not in before)
    for name in before.keys() & after.keys():
        for part in ("requestBody", "responses", "operationId"):
            if before[name].get(part) != after[name].get(part):
                yield Change(f"{name}: another {part}", True)
        had, has = ({p["name"]: p for p in op[name].get("parameters", [])} for op in (before, after))
        yield from (Change(f"{name}: parameter {one} is gone", True) for one in had if one not in has)
        for one, parameter in has.items():
            if one not in had:
                yield Change(f"{name}: parameter {one} is new", bool(parameter["required"]))
            elif parameter != had[one]:
                yield Change(f"{name}: parameter {one} is another", True)


def _schema(name: str, old: Json, new: Json, sent: bool, told: bool) -> Iterator[Change]:
    """Compare a schema that is part of requests (`sent`), of answers (`told`), or of both."""
    had, has = old.get("properties", {}), new.get("properties", {})
    must, may = set(old.get("required", [])), set(new.get("required", []))
    yield from (Change(f"{name}.{field} is gone", True) for field in had if field not in has)
    for field, kind in has.items():
        where = f"{name}.{field}"
        if field not in had:
            yield Change(f"{where} is new" + (", and required" if field in may else ""), sent and field in may)
            continue
        if field in may - must:
            yield Change(f"{where} is required", sent)
        if field in must - may:
            yield Change(f"{where} is no longer always there", told)
        gone, come = _kinds(had[field]) - _kinds(kind), _kinds(kind) - _kinds(had[field])
        yield from (Change(f"{where} is no longer {one}", sent) for one in sorted(gone))
        yield from (Change(f"{where} may be {one}", told) for one in sorted(come))
    rest = ({k: v for k, v in one.items() if k not in ("properties", "required", "description")} for one in (old, new))
    if len({repr(sorted(one.items())) for one in rest}) > 1:
        yield Change(f"{name} is of another form", True)


def _kinds(schema: Json) -> set[str]:
    """Return each kind of value that a schema takes, in words."""
    if "anyOf" in schema:
        return {kind for one in schema["anyOf"] for kind in _kinds(one)}
    if "enum" in schema:
        return {repr(value) for value in schema["enum"]}
    if "$ref" in schema:
        return {schema["$ref"].rsplit("/")[-1]}
    bounds = {key: schema[key] for key in sorted(schema) if key not in ("type", "items", "description", "default")}
    inner = f" of {' or '.join(sorted(_kinds(schema['items'])))}" if "items" in schema else ""
    return {f"{schema.get('type', 'anything')}{inner}" + (f" {bounds}" if bounds else "")}


def _sent(operation: Json) -> Any:
    return operation.get("requestBody", {})


def _told(operation: Json) -> Any:
    return operation["responses"]


def _schemas(document: Json, part: Callable[[Json], Any]) -> set[str]:
    """Return the schemas that a part of some operation holds, also within others."""
    found: set[str] = set()
    asked = list(_references(part(op) for ops in document["paths"].values() for op in ops.values()))
    while asked:
        name = asked.pop()
        if name not in found:
            found.add(name)
            asked += _references([document["components"]["schemas"].get(name, {})])
    return found


def _references(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"].rsplit("/")[-1]
            yield from _references(value.values())
        elif isinstance(value, list):
            yield from _references(value)
