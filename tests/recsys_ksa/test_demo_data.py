import pytest

from recsys_ksa.commands import demo_data
from recsys_ksa.errors import MissingPackageError


def test_a_missing_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(demo_data, "PACKAGE", "no_such_package_of_grocery_baskets")
    with pytest.raises(MissingPackageError, match="make setup"):
        demo_data.demo_log()


def test_a_package_without_its_data_is_missing_too(monkeypatch):
    monkeypatch.setattr(demo_data, "PACKAGE", "recsys_ksa")
    with pytest.raises(MissingPackageError, match="with its data files"):
        demo_data.demo_log()
