"""The arguments of `millpond bench`, and which workload each scenario is.

Light to import: a scenario's modules are imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from millpond.cluster.config import Config
from millpond.feature_actors.errors import BadRequest

if TYPE_CHECKING:
    from millpond.bench.options import Options
    from millpond.bench.workload import Workload

__all__ = ["ALIASES", "SCENARIOS", "add_arguments", "run_bench"]

#: Scenario to the module that measures it; each has `make(config, options)`, which returns its workload.
SCENARIOS = {
    "score": "what a score costs above an endpoint that does nothing",
    "events": "events a second, synced, over HTTP",
    "mixed": "scores and events together",
    "users": "scores by number of users: 10 k, 100 k, 1 M, 10 M",
    "models": "scores by number of models: 2, 60, 500; deploys under load",
    "soak": "memory and latency over many minutes of mixed load",
    "store": "the feature store by itself",
    "sketches": "the larger aggregations: how fast, and how far from the exact value",
    "faults": "kills while events are written",
    "parity": "scores that were served, computed again from the past",
    "backfill": "a view deployed on a running cluster, under a load of scores",
    "recovery": "how long a killed shard takes to be back",
    "trainset": "training sets from the past of a cluster: rows a second, and memory",
}
#: Settings that each scenario chooses.
_ITS_OWN = ("name", "port", "clock")
ALIASES = {"scale-users": "users", "scale-models": "models"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "scenarios:\n" + "".join(f"  {name:10} {about}\n" for name, about in SCENARIOS.items())
    parser.add_argument("scenario", choices=[*SCENARIOS, *ALIASES], metavar="SCENARIO")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures and plots")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction,
                        help="add a line to bench/history.jsonl (default: yes, but for --quick runs)")  # fmt: skip
    parser.add_argument("--against", nargs="?", const="1", metavar="N|COMMIT|FILE",
                        help="compare with an earlier line of the history: the last (1), the one before (2), ...; the "
                        "last of a commit; or the last of another file")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny, in seconds, to see that it works")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="figures are medians of so many (default: 3)")
    parser.add_argument("--seed", type=int, help="of ids, events and kills (default: 0; of faults: any)")
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, help="requests/s of open loops (default: each scenario's own)")
    load.add_argument("--arrivals", choices=["poisson", "fixed"], default="poisson",
                      help="of open loops: at random, or evenly (default: poisson)")  # fmt: skip
    load.add_argument("--ids", choices=["uniform", "zipf"], default="uniform",
                      help="ids that scores are asked for: all alike, or some hot (default: uniform)")  # fmt: skip
    load.add_argument("--zipf-exponent", type=float, default=1.1, metavar="S", help="how hot (default: 1.1)")
    load.add_argument("--minutes", type=float, default=20.0, help="soak: length after the warm-up (default: 20)")
    load.add_argument("--kills", type=int, default=100, help="faults: how many processes are killed (default: 100)")
    load.add_argument("--events", type=int, default=1_000_000, metavar="N",
                      help="faults: how many events are sent meanwhile (default: 1,000,000)")  # fmt: skip
    load.add_argument("--no-ray", action="store_true", help="store: leave out the reads by actor call, which need Ray")


def run_bench(arguments: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    """Run a scenario and report; return the exit status, 1 if an invariant did not hold.

    Raises `MillpondError` that says what is wrong with the arguments before anything runs.
    """
    from millpond.bench.history import HISTORY
    from millpond.bench.workload import run_workload

    if arguments.quick and arguments.record:
        raise BadRequest("bench: figures of a --quick run are not recorded; leave one of the two out")
    if arguments.html is not None and not os.access(arguments.html.absolute().parent, os.W_OK):
        raise BadRequest(f"bench: --html {arguments.html}: there is no folder for it that can be written to; make one")
    for name in _ITS_OWN:
        if origins[name].startswith("flag"):
            raise BadRequest(f"bench: --{name} is each scenario's own; leave it out")
    if origins["data_dir"] == "default":
        config = replace(config, data_dir=tempfile.gettempdir())
    options = options_of(arguments)
    # Of a checkout: an installed package has no history.
    records = HISTORY.exists() and not arguments.quick if arguments.record is None else arguments.record
    # So that everything that was started is stopped and cleared away.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run_workload(
            workload_of(arguments.scenario, config, options),
            as_json=arguments.json,
            record_to=HISTORY if records else None,
            html=arguments.html,
            against=arguments.against,
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def options_of(arguments: argparse.Namespace) -> Options:
    """Return what the arguments ask of a workload. Raises `BadRequest` for what makes no sense."""
    from millpond.bench.options import Ids, Options

    return Options(
        seconds=arguments.seconds, rounds=arguments.rounds, quick=arguments.quick, seed=arguments.seed,
        rate=arguments.rate, arrivals=arguments.arrivals, ids=Ids(arguments.ids, arguments.zipf_exponent),
        minutes=arguments.minutes, kills=arguments.kills, events=arguments.events, ray=not arguments.no_ray,
    )  # fmt: skip


def workload_of(scenario: str, config: Config, options: Options) -> Workload:
    """Return the workload of a scenario, by its name or alias."""
    module = importlib.import_module(f"millpond.bench.{ALIASES.get(scenario, scenario)}")
    made: Workload = module.make(config, options)
    return made
