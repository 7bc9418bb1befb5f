"""The pickers of this folder, and grpc.aio's server for our own, can be imported."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path += [str(FOLDER), str(FOLDER.parent / "extproc")]
