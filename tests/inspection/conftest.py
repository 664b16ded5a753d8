"""Prepared data, as the tests of data have it."""

from tests.data.conftest import corpus_file, data_dir

__all__ = ["corpus_file", "data_dir"]
