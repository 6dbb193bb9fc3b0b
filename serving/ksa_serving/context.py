"""What a request brings beside its body."""

import time

from msgspec import Struct

from ksa_serving import admission
from ksa_serving.errors import DeadlineError
from ksa_serving.events import Owner
from ksa_serving.settings import Limits
from ksa_serving.shards import Edge, Ownership


class Context(Struct, frozen=True):
    """Whose users a request means, and until when its work may begin."""

    tenant: str = ""
    deadline: float | None = None
    """On `time.monotonic`'s clock; None: as the settings say."""
    ownership: Ownership | None = None
    """Whose users this process answers for; None: everyone's."""
    writing: bool = False
    edge: Edge | None = None
    """What the proxy said; None: the request came without one."""
    inspecting: bool = True
    """Whether the caller may know how an answer came to be."""

    def owner(self, user_id: str, limits: Limits) -> Owner:
        """Return whom a user id names.

        Raises:
            InvalidRequestError: the id is out of its limits.
            NotOwnerError: another process has to answer.
        """
        admission.check_user_id(user_id, limits)
        if self.ownership is not None:
            self.ownership.check(user_id, self.writing, self.edge)
        return Owner(user_id, self.tenant)

    def work_until(self, default_seconds: float) -> float:
        """Return until when work may begin.

        Raises:
            DeadlineError: it is too late already.
        """
        now = time.monotonic()
        if self.deadline is None:
            return now + default_seconds
        if self.deadline < now:
            raise DeadlineError("deadline: it passed before the request's work began.")
        return self.deadline


NOBODY = Context()
"""Of a call that brings nothing: the one tenant, and the deadline of the settings."""
