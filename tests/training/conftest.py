"""What tests of the trainer share."""

import pytest


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs the trainer as a program, see `forks.py`; one for each process of tests."""
    from forks import Forks

    own = Forks(tmp_path_factory.mktemp("forks"))
    yield own
    own.close()
