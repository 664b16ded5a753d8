"""Prepared data, as the tests of data have it."""

from tests.data.conftest import *  # noqa: F403
