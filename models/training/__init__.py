"""Training sets: labels with the features that the cluster would have served at their time.

rows = training_set(churn, labels, {"purchases": events})       # tables in memory, features back
about = write_training_set(churn, path, Past(...), out)         # files of any size, from a cluster's past
"""

from millpond.models.training.making import training_set, write_training_set
from millpond.models.training.runs import Room
from millpond.models.training.workers import Threads

__all__ = ["Room", "Threads", "training_set", "write_training_set"]
