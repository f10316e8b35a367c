"""``python -m convexheads``: the same as the command ``convexheads``."""

import sys

from convexheads.cli import main

if __name__ == "__main__":
    sys.exit(main())
