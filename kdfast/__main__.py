"""`python -m kdfast` is the command line."""

import sys

from kdfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
