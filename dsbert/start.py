"""`python .../dsbert/start.py MODULE ARGUMENT...` runs a module of this very package, wherever it is started.

`python -m` would put the working directory first on sys.path: a folder `dsbert` there (the checkout, seen from the
folder above it), or a xxhash.py or torch.py of somebody's, would be imported instead of what the parent has imported.
So this file is run by its path, knows by it where the package is, and imports nothing before sys.path is in order.
Python 3.11 has `-P` for the half of it.
"""

import sys


def forget_first_entry(expected: str) -> None:
    """Drop what Python itself has put first on sys.path, if that is `expected`; with -P or -I it has put nothing."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)) and sys.path[:1] == [expected]:
        del sys.path[0]


def keep_out_working_directory() -> None:
    """Python programs that libraries start from here with `-m` are not to import from it either (since Python 3.11)."""
    import os

    os.environ["PYTHONSAFEPATH"] = "1"


def main() -> None:
    """Run the module as `__main__`, with the arguments that follow it."""
    package = __file__.rpartition("/")[0]
    forget_first_entry(package)
    keep_out_working_directory()

    import importlib.util
    import runpy

    spec = importlib.util.spec_from_file_location("dsbert", f"{package}/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["dsbert"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
