"""The service's typed errors; `problems.py` turns them into answers."""

from recsys_ksa.errors import RecsysKsaError


class ServiceError(RecsysKsaError):
    """A request that cannot be served; `status` and `code` are what the caller is told."""

    status = 500
    code = "internal-error"

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


class EventLogError(ServiceError):
    """The event log cannot be opened, read or written; nothing unacknowledged was kept."""

    status = 503
    code = "event-log-unavailable"


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
