"""Prints the first two ``bash`` blocks of a README, one command a line."""

import re
import sys
from pathlib import Path

blocks = re.findall(r"^```bash\n(.*?)^```", Path(sys.argv[1]).read_text(), re.DOTALL | re.MULTILINE)
if len(blocks) < 2:
    sys.exit(f"{sys.argv[1]}: expected two bash blocks, found {len(blocks)}")
for block in blocks[:2]:
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    print(" && ".join(" ".join(line.split()) for line in lines))
