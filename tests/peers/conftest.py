import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # side_by_side
pytest.register_assert_rewrite("side_by_side")
