"""A painted figure, as bytes of an image. matplotlib is imported here, when something is drawn, and nowhere else."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from recsys_ksa.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def painted(paint: "Callable[[Axes], None]", form: Literal["png", "svg"]) -> bytes:
    """Return what `paint` draws on the axes it is given.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"plots: expected the package matplotlib, got: {error}. Install it with "
            '`pip install "recsys-ksa[evaluate]"`; `ksa evaluate --tracking none` goes without plots.'
        ) from error
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    paint(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=120, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()
