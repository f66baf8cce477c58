"""Load each file of a folder as the artifact of a definition, as the product does, and say what came of it.

Run in a process of its own: a library that follows a broken file out of bounds ends the process. One JSON line a file:
what was raised, or what was predicted, and what ran besides that has no business here.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.plan import FeatureRows
from millpond.models.definition import Definition, load_models

#: Of Python's audit events: what unpickles a class, starts another program or reaches out.
FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)

#: A file that asks for more than there is must not get it.
MEMORY_BYTES_MAX = 6 << 30


def main(definition: Path, folder: Path, names: list[str]) -> None:
    seen: list[str] = []
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    sys.addaudithook(lambda event, _: seen.append(event) if event in FORBIDDEN else None)
    text = definition.read_text()
    declared = Definition("defs.py", text).declared()
    layout = compile_layout(declared.sources, declared.views)
    (file,) = declared.models[0].artifacts.values()
    matrix = np.load(folder / "matrix.npy", allow_pickle=False)
    rows = FeatureRows(matrix, np.zeros(len(matrix), np.int64), [[] for _ in matrix], {})
    for name in names:
        outcome: dict[str, Any] = {"name": name}
        seen.clear()
        try:
            one = Definition("defs.py", text, {file: (folder / name).read_bytes()})
            loaded = load_models([one], layout)["churn"]
            outcome["results"] = loaded.predict(rows)
        except Exception as error:
            outcome["refused"] = f"{type(error).__name__}: {error}"
        outcome["forbidden"] = list(seen)
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
