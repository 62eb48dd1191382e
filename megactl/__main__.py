"""`python -m megactl`."""

import sys

from megactl.cli import main

if __name__ == "__main__":
    sys.exit(main())
