"""The table, its maps and its path lie beside the tests, for tests/benchmarks/families.py as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
