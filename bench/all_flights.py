"""The definition of `bench trainset`: a model that reads every feature of every view of the flights example."""

from __future__ import annotations

from functools import partial

from millpond.feature_actors.view import FeatureView
from millpond.models import Model
from millpond.models import flight_delay as example  # the module: its model is not to be declared here, too
from millpond.models.logistic import Logistic

VIEWS = {name: view for name, view in vars(example).items() if isinstance(view, FeatureView)}
FEATURES = [feature for view in VIEWS.values() for feature in view]

all_flights = Model(
    "all_flights",
    version="1",
    owner="bench",
    features=FEATURES,
    predictor=partial(Logistic, [0.0] * len(FEATURES)),  # predicts nothing here: a model has to have one
)
