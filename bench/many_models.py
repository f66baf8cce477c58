"""Makes definition files of many small models: each of its own team, with features, weights and versions of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from millpond.bench.twenty_views import views
from millpond.models.logistic import Logistic

__all__ = ["ModelFile", "draw_models", "write_model"]

FEATURES_MIN, FEATURES_MAX, VIEWS_MAX = 5, 20, 4

_TEXT = '''"""Model {name}, version {version}, over {views} views."""

from millpond.bench.twenty_views import views
from millpond.models import Model
from millpond.models.logistic import Logistic

model = Model(
    "{name}",
    version="{version}",
    owner="bench",
    features=[views[view][feature] for view, feature in {features}],
    predictor=Logistic.load,
    artifacts={{"weights": "{weights}"}},
)
'''


@dataclass(frozen=True)
class ModelFile:
    """What one model reads: (view, feature) pairs."""

    name: str
    features: tuple[tuple[str, str], ...]

    @property
    def views(self) -> int:
        return len({view for view, _ in self.features})


def draw_models(count: int, seed: int) -> list[ModelFile]:
    """Return so many models of 5 to 20 features, each of up to 4 of the 20 views.

    The first two read about as many features and views as the mean of all: a ratio of all to two is then not one of
    their sizes.
    """
    draw = random.Random(seed)
    drawn = []
    for _ in range(count):
        n = draw.randint(FEATURES_MIN, FEATURES_MAX)
        each = len(next(iter(views.values())).features)
        chosen = draw.sample(sorted(views), draw.randint(-(-n // each), VIEWS_MAX))
        pairs = [(view, feature) for view in chosen for feature in views[view].features]
        drawn.append(tuple(sorted(draw.sample(pairs, n))))
    shapes = [(len(features), len({view for view, _ in features})) for features in drawn]
    means = mean(n for n, _ in shapes), mean(v for _, v in shapes)
    order = sorted(range(count), key=lambda i: sum(abs(a - m) / m for a, m in zip(shapes[i], means, strict=True)))
    order = order[:2] + sorted(order[2:])
    return [ModelFile(f"model_{number:03d}", drawn[i]) for number, i in enumerate(order)]


def write_model(folder: Path, model: ModelFile, version: str) -> Path:
    """Write the definition file of a version, and its weights beside it; return its path."""
    name = f"{model.name}_v{version}"
    # Another version has other weights.
    weights = np.random.default_rng(list(name.encode())).normal(0, 0.01, len(model.features))
    Logistic(weights).save(str(folder / f"{name}.npz"))
    text = _TEXT.format(
        name=model.name, version=version, views=model.views, features=list(model.features), weights=f"{name}.npz"
    )
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def mean_shape(models: Sequence[ModelFile]) -> tuple[float, float]:
    """Return how many features and views a model reads, the means."""
    return round(mean(len(m.features) for m in models), 2), round(mean(m.views for m in models), 2)
