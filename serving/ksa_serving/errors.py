"""The service's typed errors; `problems.py` turns them into answers."""

import math

from recsys_ksa.errors import RecsysKsaError


class ServiceError(RecsysKsaError):
    """A request that cannot be served; `status` and `code` are what the caller is told."""

    status = 500
    code = "internal-error"
    retry_after: int | None = None
    """Seconds after which the caller may try again; None: trying again changes nothing."""

    def __init__(self, detail: str, code: str | None = None):
        super().__init__(detail)
        self.code = code or self.code


class InvalidRequestError(ServiceError):
    """The caller's request is malformed or out of its limits."""

    status = 400
    code = "invalid-request"


class OverloadedError(ServiceError):
    """More work waits than the limits allow; the caller tries again later."""

    status = 503
    code = "overloaded"
    retry_after = 1


class RateError(ServiceError):
    """More comes for one user than the settings allow; nothing was kept. The caller tries again after some seconds."""

    status = 429
    code = "user-rate-limited"

    def __init__(self, detail: str, seconds: float):
        super().__init__(detail)
        self.retry_after = max(1, math.ceil(seconds))


class EventLogError(ServiceError):
    """The event log cannot be opened, read or written; nothing unacknowledged was kept."""

    status = 503
    code = "event-log-unavailable"
    retry_after = 1


class UnknownEventError(ServiceError):
    """The user has no event of this id."""

    status = 404
    code = "unknown-event"


class DeadlineError(ServiceError):
    """The request's deadline passed before its work began; nothing was computed."""

    status = 504
    code = "deadline-exceeded"


class NotOwnerError(ServiceError):
    """The user is another process's, or on the way there; nothing was kept. The caller tries again."""

    status = 503
    code = "user-elsewhere"
    retry_after = 1


class ShardError(ServiceError):
    """Virtual shards cannot be moved so; what was owned stays owned."""

    status = 409
    code = "move-refused"


class ReleaseError(ServiceError):
    """A release cannot be loaded, activated or rolled back to; what was served goes on."""

    status = 409
    code = "release-refused"


class ClientError(RecsysKsaError):
    """The service refused a request of the client for what it says (`refused`), or cannot answer it now."""

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


class SourceError(RecsysKsaError):
    """A log of messages cannot be read."""
