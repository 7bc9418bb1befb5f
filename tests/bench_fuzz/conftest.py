"""``bench`` is run from the repository's root, not installed: make it importable the same way."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
