"""Where the ready configs are: inside an installed wheel, or beside the package in a checkout."""

from pathlib import Path

from recsys_ksa.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent


def config_file(name: str) -> Path:
    """Return the path of a ready config, such as `complete-journey/ksa.toml`.

    Raises:
        ConfigError: there is none of that name.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"configs/{name}: expected a ready config, found none. Install the package again.")
