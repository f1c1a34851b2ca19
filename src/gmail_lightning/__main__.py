"""``python -m gmail_lightning``."""

import sys

from gmail_lightning.main import main

if __name__ == "__main__":
    sys.exit(main())
