"""Hypothesis: random examples, whose seed and blob are printed when one fails, so that it replays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests share `worlds`, `apps` and the contracts, which stand beside them.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("apps", "http_server", "port_contract", "served_contract")

#: Examples per property, as a multiple of what is moderate on two cores.
EXAMPLES = float(os.environ.get("MILLPOND_EXAMPLES", "1"))

for name, base in (("millpond", 40), ("thorough", 400)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=False,
        print_blob=True,
        max_examples=max(1, round(base * EXAMPLES)),
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "millpond"))
