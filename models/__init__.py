"""What a model is, and how one is loaded, trained for and asked."""

if __name__ != "millpond.models":
    raise ImportError(f"import millpond.models, not {__name__}: a second copy would double every class")

from millpond.models.features import Features
from millpond.models.model import Model
from millpond.models.pool import Pool
from millpond.models.reader import FeatureReader
from millpond.models.training import training_set

__all__ = ["FeatureReader", "Features", "Model", "Pool", "training_set"]
