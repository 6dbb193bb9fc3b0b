"""The service's typed errors; `problems.py` turns them into answers."""

from recsys_ksa.errors import RecsysKsaError


class ServiceError(RecsysKsaError):
    """A request that cannot be served; `status` and `code` are what the caller is told."""

    status = 500
    code = "internal-error"


class InvalidRequestError(ServiceError):
    """The caller's request is malformed or out of its limits."""

    status = 400

    def __init__(self, detail: str, code: str = "invalid-request"):
        super().__init__(detail)
        self.code = code


class OverloadedError(ServiceError):
    """More work waits than the limits allow; the caller tries again later."""

    status = 503
    code = "overloaded"


class EventLogError(ServiceError):
    """The event log cannot be opened, read or written; nothing unacknowledged was kept."""

    status = 503
    code = "event-log-unavailable"
