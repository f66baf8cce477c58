"""The aggregations: what a feature computes over the events of its window. One file each.

Every file of this folder is imported here, so that a new one is known to the kernels, the oracle, the tests and the
tables of the documentation by being there.
"""

from __future__ import annotations

import importlib
import pkgutil

from millpond.feature_actors.aggregations.aggregation import (
    AGGREGATIONS,
    NUMBERS,
    PARTS,
    Aggregation,
    Column,
    Part,
)
from millpond.feature_actors.aggregations.count import Count
from millpond.feature_actors.aggregations.count_by import CountBy
from millpond.feature_actors.aggregations.decayed_count import DecayedCount
from millpond.feature_actors.aggregations.decayed_mean import DecayedMean
from millpond.feature_actors.aggregations.decayed_sum import DecayedSum
from millpond.feature_actors.aggregations.derived import Derived, Ratio
from millpond.feature_actors.aggregations.distinct import Distinct
from millpond.feature_actors.aggregations.entropy import Entropy
from millpond.feature_actors.aggregations.first import First
from millpond.feature_actors.aggregations.input import Input, where_text
from millpond.feature_actors.aggregations.kurtosis import Kurtosis
from millpond.feature_actors.aggregations.last import Last
from millpond.feature_actors.aggregations.last_n import LastN
from millpond.feature_actors.aggregations.max import Max
from millpond.feature_actors.aggregations.mean import Mean
from millpond.feature_actors.aggregations.median import Median
from millpond.feature_actors.aggregations.min import Min
from millpond.feature_actors.aggregations.quantile import Quantile
from millpond.feature_actors.aggregations.rate import Rate
from millpond.feature_actors.aggregations.seconds_since import SecondsSince
from millpond.feature_actors.aggregations.seconds_since_first import SecondsSinceFirst
from millpond.feature_actors.aggregations.session_seconds import SessionSeconds
from millpond.feature_actors.aggregations.sessions import Sessions
from millpond.feature_actors.aggregations.skew import Skew
from millpond.feature_actors.aggregations.std import Std
from millpond.feature_actors.aggregations.streak import Streak
from millpond.feature_actors.aggregations.streak_days import StreakDays
from millpond.feature_actors.aggregations.sum import Sum
from millpond.feature_actors.aggregations.sum_by import SumBy
from millpond.feature_actors.aggregations.top_k import TopK
from millpond.feature_actors.aggregations.top_k_counts import TopKCounts
from millpond.feature_actors.aggregations.trend import Trend

__all__ = [
    "AGGREGATIONS",
    "NUMBERS",
    "PARTS",
    "Aggregation",
    "Column",
    "Count",
    "CountBy",
    "DecayedCount",
    "DecayedMean",
    "DecayedSum",
    "Derived",
    "Distinct",
    "Entropy",
    "First",
    "Input",
    "Kurtosis",
    "Last",
    "LastN",
    "Max",
    "Mean",
    "Median",
    "Min",
    "Part",
    "Quantile",
    "Rate",
    "Ratio",
    "SecondsSince",
    "SecondsSinceFirst",
    "Skew",
    "SessionSeconds",
    "Sessions",
    "Std",
    "Streak",
    "StreakDays",
    "Sum",
    "SumBy",
    "TopK",
    "TopKCounts",
    "Trend",
    "where_text",
]

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "dispatch":  # which compiles what all the others have declared
        importlib.import_module(f"{__name__}.{_module.name}")
