"""`python -m dsbert` is the command `dsbert`."""

from dsbert.cli import main

if __name__ == "__main__":
    main()
