"""Tests of dsbert: the folders mirror the package."""
