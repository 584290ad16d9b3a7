"""Settings of the whole suite."""

import pytest
from hypothesis import settings

# A kernel's first call compiles it, which takes seconds: no deadline. The same examples at every
# run: a green run means the same thing everywhere.
settings.register_profile("onnxq", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("onnxq")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes minutes or gigabytes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
