"""The library's typed errors. Each message says who is wrong, what was expected, what came, what to do.

The command `ksa` prints any of them as one line and exits with code 2. Torch-free.
"""


class RecsysKsaError(Exception):
    """Any mistake of a caller or a user that the library recognises."""


class UsageError(RecsysKsaError):
    """A command was called in a form it does not have."""


class ConfigError(RecsysKsaError):
    """A configuration has an unknown key, a wrong type, or two values that contradict each other."""


class SchemaError(RecsysKsaError):
    """A table or log lacks a column, or a column has the wrong type or values."""


class DataError(RecsysKsaError):
    """A data set directory is missing, damaged, or does not match its manifest."""


class RunError(RecsysKsaError):
    """A run directory is missing, damaged, already there, or disagrees with a data set or an index."""


class ProtocolError(RecsysKsaError):
    """An evaluation was asked for that this data or this run cannot honestly give."""


class StateError(RecsysKsaError):
    """A user state does not belong to this model, or was used in a way it cannot be."""


class OutOfOrderError(StateError):
    """The first event to append, after sorting, lies before the state's last event."""


class PoolFullError(RecsysKsaError):
    """An accelerator's pool of pages has no room for what was asked to be held."""


class MissingPackageError(RecsysKsaError):
    """An optional package is needed for what was asked and is not installed."""
