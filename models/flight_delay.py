"""Will this flight arrive more than 15 minutes late? Asked when it has just left the gate.

The example to copy: two sources, eight views, one model. A request names the aircraft, the carrier and
the route of a flight; everything else comes from the events before.
"""

import numpy as np
import numpy.typing as npt

from millpond.feature_actors import Count, FeatureView, Field, Last, Max, Mean, SecondsSince, Source, Sum
from millpond.models import Model
from millpond.models.trees import BoostedTrees, save_trees

FLIGHT = dict.fromkeys(("flight_id", "tailnum", "carrier", "origin", "dest"), "string")

departures = Source(
    "departures",
    owner="airport-operations",
    about="One event per flight, when it leaves the gate.",
    fields={
        **FLIGHT,
        "flight": "int64",
        "distance": "float64",  # miles
        "sched_dep_hour": "float64",  # local time of the origin
        "weekday": "float64",  # Monday is 0
        "dep_delay": "float64",  # minutes
        "departed_at": "timestamp[ms, UTC]",
    },
    event_id="flight_id",
    event_time="departed_at",
)

arrivals = Source(
    "arrivals",
    owner="airport-operations",
    about="One event per flight, when it reaches a gate; a diverted one has no delay.",
    fields={
        **FLIGHT,
        "arr_delay": Field("float64", optional=True),  # minutes
        "air_time": Field("float64", optional=True),  # minutes
        "arrived_at": "timestamp[ms, UTC]",
    },
    event_id="flight_id",
    event_time="arrived_at",
)

OWNER = "delay-prediction"

this_departure = FeatureView(
    "this_departure",
    owner=OWNER,
    about="What is known of the flight itself: it is the last departure of its aircraft.",
    source=departures,
    key=["tailnum"],
    features={
        "distance": Last("distance"),
        "sched_dep_hour": Last("sched_dep_hour"),
        "weekday": Last("weekday"),
        "dep_delay": Last("dep_delay"),
        "flights_24h": Count(window="24h"),
    },
)
carrier_departures = FeatureView(
    "carrier_departures",
    owner=OWNER,
    source=departures,
    key=["carrier"],
    features={"dep_delay_3h": Mean("dep_delay", window="3h"), "worst_3h": Max("dep_delay", window="3h")},
)
route_departures = FeatureView(
    "route_departures",
    owner=OWNER,
    source=departures,
    key=["origin", "dest"],
    features={"flights_7d": Count(window="7d"), "dep_delay_30d": Mean("dep_delay", window="30d")},
)
origin_departures = FeatureView(
    "origin_departures",
    owner=OWNER,
    source=departures,
    key=["origin"],
    features={"flights_1h": Count(window="1h"), "delay_minutes_1h": Sum("dep_delay", window="1h")},
)
aircraft_arrivals = FeatureView(
    "aircraft_arrivals",
    owner=OWNER,
    source=arrivals,
    key=["tailnum"],
    features={
        "last_arr_delay": Last("arr_delay"),
        "since_arrival_s": SecondsSince(),
        "arr_delay_24h": Mean("arr_delay", window="24h"),
    },
)
carrier_arrivals = FeatureView(
    "carrier_arrivals",
    owner=OWNER,
    source=arrivals,
    key=["carrier"],
    features={
        "arr_delay_3h": Mean("arr_delay", window="3h"),
        "arr_delay_24h": Mean("arr_delay", window="24h"),
    },
)
route_arrivals = FeatureView(
    "route_arrivals",
    owner=OWNER,
    source=arrivals,
    key=["origin", "dest"],
    features={
        "arr_delay_3h": Mean("arr_delay", window="3h"),
        "arr_delay_24h": Mean("arr_delay", window="24h"),
        "last_arr_delay": Last("arr_delay", window="30d"),
        "air_time_24h": Mean("air_time", window="24h"),  # the winds of the day against the month's
        "air_time_30d": Mean("air_time", window="30d"),
    },
)
origin_arrivals = FeatureView(
    "origin_arrivals",
    owner=OWNER,
    source=arrivals,
    key=["origin"],
    features={
        "arr_delay_1h": Mean("arr_delay", window="1h"),
        "arr_delay_24h": Mean("arr_delay", window="24h"),
    },
)

flight_delay = Model(
    "flight_delay",
    version="1",
    owner=OWNER,
    about="Probability that the flight arrives more than 15 minutes late.",
    features=[
        *(this_departure[name] for name in ("distance", "sched_dep_hour", "weekday", "dep_delay")),
        *[*origin_departures, *carrier_departures, *aircraft_arrivals],
        *[*carrier_arrivals, *route_arrivals, *origin_arrivals],
    ],
    predictor=BoostedTrees,
    artifacts={"trees": "flight_delay.npz"},
)


def train(matrix: npt.NDArray[np.float64], late: npt.NDArray[np.bool_], path: str) -> None:
    """Train on float64 [flights, features], as the shards served them, and write the artifact."""
    from sklearn.ensemble import HistGradientBoostingClassifier as Boosting

    learner = Boosting(max_leaf_nodes=15, min_samples_leaf=300, early_stopping=False, random_state=0)
    save_trees(learner.fit(matrix, late), path)
