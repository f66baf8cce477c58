"""The definition of `bench trainset`: a model that reads every feature of every view of the flights example."""

from __future__ import annotations

from millpond.bench.reference import Logistic  # predicts nothing here: a model has to have one
from millpond.feature_actors.view import FeatureView
from millpond.models import Model
from millpond.models import flight_delay as example  # the module: its model is not to be declared here, too

VIEWS = {name: view for name, view in vars(example).items() if isinstance(view, FeatureView)}

all_flights = Model(
    "all_flights",
    version="1",
    owner="bench",
    features=[feature for view in VIEWS.values() for feature in view],
    predictor=Logistic,
)
