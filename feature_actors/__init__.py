"""Sources, feature views and the shards that keep their state."""

if __name__ != "millpond.feature_actors":
    raise ImportError(f"import millpond.feature_actors, not {__name__}: a second copy would double every class")

from millpond.feature_actors.aggregations import (
    Count,
    CountBy,
    Derived,
    First,
    Last,
    LastN,
    Max,
    Mean,
    Min,
    Rate,
    Ratio,
    SecondsSince,
    SecondsSinceFirst,
    Std,
    Sum,
    SumBy,
    TopK,
    TopKCounts,
)
from millpond.feature_actors.errors import MillpondError
from millpond.feature_actors.source import Field, Source
from millpond.feature_actors.view import FeatureView

__all__ = [
    "Count",
    "CountBy",
    "Derived",
    "FeatureView",
    "Field",
    "First",
    "Last",
    "LastN",
    "Max",
    "Mean",
    "MillpondError",
    "Min",
    "Rate",
    "Ratio",
    "SecondsSince",
    "SecondsSinceFirst",
    "Source",
    "Std",
    "Sum",
    "SumBy",
    "TopK",
    "TopKCounts",
]
