"""Who may do what: bearer tokens with scopes, kept as hashes in a TOML file that is read again when it changes.

    [[token]]
    name = "shop-frontend"      # appears in logs and metrics
    sha256 = "9f86d081..."      # of the token: `printf %s TOKEN | sha256sum`
    scopes = ["read", "ingest"] # of read, inspect, ingest, delete, admin
    tenant = "shop"             # users of other tenants cannot be reached; "" unless set

`read` asks for recommendations and scores. `inspect` reads what is kept of a user: the history, the state,
explanations, and in answers where the state came from, which tells whether the user was active lately.

A token should be long and random, as `openssl rand -hex 32` makes it: then its plain hash cannot be guessed.
"""

import hashlib
import hmac
import time
import tomllib
from pathlib import Path
from typing import Literal

from msgspec import Struct
from pydantic import ValidationError

from recsys_ksa.config import Strict
from recsys_ksa.errors import UsageError

TokenScope = Literal["read", "inspect", "ingest", "delete", "admin"]
ALL_SCOPES: frozenset[TokenScope] = frozenset({"read", "inspect", "ingest", "delete", "admin"})


class Token(Strict):
    """One token of the file."""

    name: str
    sha256: str
    scopes: list[TokenScope]
    tenant: str = ""


class _TokenFile(Strict):
    token: list[Token]


class Caller(Struct, frozen=True):
    """Who asks: the token's name or the address, what they may do, and whose users they see."""

    name: str
    scopes: frozenset[TokenScope]
    tenant: str = ""


def open_door(address: str) -> Caller:
    """Return the caller where no tokens are asked for: on loopback."""
    return Caller(address, ALL_SCOPES)


class Tokens:
    """The tokens of a file; a changed file takes effect within a second, a broken one leaves the old ones.

    Raises:
        UsageError: the file cannot be read at start, or is not as above.
    """

    def __init__(self, path: Path):
        self._path = path
        self._checked = time.monotonic()
        self._stamp = self._look()
        self._tokens = self._read()

    def caller(self, authorization: str | None) -> Caller | None:
        """Return who sent this `Authorization` header, or None. Every token is compared, in constant time."""
        self._refresh()
        kind, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known in self._tokens:
            if hmac.compare_digest(known.sha256.lower(), digest) and kind.lower() == "bearer":
                found = Caller(known.name, frozenset(known.scopes), known.tenant)
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < 1:
            return
        self._checked = now
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._tokens, self._stamp = self._read(), stamp
        except (UsageError, OSError):
            return

    def _look(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise UsageError(f"--tokens {self._path}: expected a TOML file, got: {error.strerror}.") from error
        return found.st_mtime_ns, found.st_size

    def _read(self) -> list[Token]:
        try:
            return _TokenFile.model_validate(tomllib.loads(self._path.read_text(encoding="utf-8"))).token
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"--tokens {self._path}: expected a TOML file, got: {error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"--tokens {self._path}: {where}: {first['msg']}.") from error
