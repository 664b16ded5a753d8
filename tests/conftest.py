"""Settings of every test. Fixtures stand beside the tests that use them; plain functions stand in helpers.py."""

import os

# Two test processes on two cores with two threads each would mostly wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that needs the network is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
