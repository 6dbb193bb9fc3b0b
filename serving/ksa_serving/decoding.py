"""What a request says, decoded strictly: its body by msgspec whatever its content type says, its path as UTF-8."""

from typing import TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from ksa_serving.errors import InvalidRequestError

Asked = TypeVar("Asked")


def decoded(body: bytes, kind: type[Asked]) -> Asked:
    """Return a body of JSON as `kind`.

    Raises:
        InvalidRequestError: it is no JSON, or another message.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"body: {error}. See /openapi.json.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"body: expected JSON in UTF-8, got: {error}.", "invalid-json") from error


def text_of(segment: str) -> str:
    """Return the text of a percent-encoded segment of a path.

    Raises:
        InvalidRequestError: it is no UTF-8.
    """
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        detail = "path: expected percent-encoded UTF-8, got other bytes. Encode it again."
        raise InvalidRequestError(detail, "invalid-user-id") from None
