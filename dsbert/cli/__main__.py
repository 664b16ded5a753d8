"""`python -m dsbert.cli`: jobs that were submitted before say it so."""

from dsbert.cli import main

if __name__ == "__main__":
    main()
