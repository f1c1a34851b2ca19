"""``python -m gmail_lightning``."""

import os
import sys

if sys.path[0] in (
    "",
    os.getcwd(),
):  # by ``python -m`` the working directory comes first, and would shadow what it names
    sys.path.append(sys.path.pop(0))

from gmail_lightning.command.main import main

if __name__ == "__main__":
    sys.exit(main())
