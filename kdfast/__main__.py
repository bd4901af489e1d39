"""Run the command line with `python -m kdfast`."""

import sys

from kdfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
