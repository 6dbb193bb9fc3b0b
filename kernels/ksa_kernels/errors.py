"""Typed errors of the kernels. The bottom layer owns its own; both are ValueErrors."""


class ShapeError(ValueError):
    """An argument's shape, dtype, layout in memory or device disagrees with another argument."""


class ImplUnavailableError(ValueError):
    """The implementation asked for by name cannot run here, or no implementation has that name."""
