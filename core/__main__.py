"""`python -m svb` is `svb`."""

from svb.cli import main

if __name__ == "__main__":
    main()
