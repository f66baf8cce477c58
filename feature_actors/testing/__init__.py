"""The test kit, for teams that test their features and models: a cluster in the process of a test, and an oracle.

It stands outside the layers, as `bench` and the tests do, since it needs the models: nothing of Millpond imports it.
"""

from millpond.feature_actors.testing.cluster import Ack, Score, TestCluster, ViewFeatures
from millpond.feature_actors.testing.parity import assert_parity

__all__ = ["Ack", "Score", "TestCluster", "ViewFeatures", "assert_parity"]
