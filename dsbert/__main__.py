"""`python -m dsbert` is the command `dsbert`."""

import os

from dsbert.start import forget_first_entry, keep_out_working_directory

if __name__ == "__main__":
    # Before anything else is imported: `-m` has put the working directory first on sys.path.
    forget_first_entry(os.getcwd())
    keep_out_working_directory()

    from dsbert.cli.app import main

    main()
