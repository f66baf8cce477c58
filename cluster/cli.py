"""The `millpond` command. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from millpond.bench.command import add_arguments as add_bench_arguments
from millpond.bench.command import run_bench
from millpond.cluster.config import SECTIONS, Config, load_config
from millpond.feature_actors.errors import MillpondError, Unavailable

__all__ = ["main"]

#: Commands that start a cluster, for which every setting matters, or show them.
_STARTS = frozenset({"up", "demo", "bench", "config"})
#: Settings by which a cluster that is there is found.
_WHICH = frozenset({"name", "data_dir"})


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, or 1 after an error that stands on standard error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(options, "key"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        flags = {f.name: getattr(options, f.name, None) for f in fields(Config)}
        config, origins = load_config(options.config, flags=flags)
        result: int = options.run(options, config, origins)
        return result
    except MillpondError as error:
        print(f"millpond: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a file that may not be read, a disk that is full
        if error.filename is None and error.errno is None:
            raise
        print(f"millpond: {os.strerror(error.errno or 0)}: {error.filename or 'no file is named'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _Help(argparse.HelpFormatter):
    """Help whose usage leaves the settings out, of which there are fifty, and in which most arguments take a line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        settings = {f.name for f in fields(Config)}
        super().add_usage(usage, [one for one in actions if one.dest not in settings], groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _add_settings(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    """Add a flag for each setting; unless they are `shown`, help has only those that say which cluster is meant."""
    of = {f.name: f for f in fields(Config)}
    hints = get_type_hints(Config)
    about = "Settings, each with its default; also lines of the file, and variables (MILLPOND_DATA_DIR). "
    others = "" if shown else "All others are flags here, too: see `millpond config --help`."
    for title, names in SECTIONS.items():
        group = parser.add_argument_group(title, about + others if title == "cluster" else None)
        if title == "cluster":
            group.add_argument("--config", type=Path, metavar="FILE", help="millpond.toml if it is there, or this one")
        for name in names:
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                metavar="|".join(get_args(hints[name])) or str(of[name].default),
                help=of[name].metadata["about"] if shown or name in _WHICH else argparse.SUPPRESS,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millpond", description="Raw events in, model scores out.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, formatter_class=_Help)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "Run real data end to end and measure it: flights in, delay scores out.")
    demo.add_argument("dataset", nargs="?", choices=["flights", "churn", "recommend", "fraud"], default="flights")
    demo.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    demo.add_argument("--keep", action="store_true", help="go on serving at the end, until Ctrl-C")
    up = command("up", _up, "Start a cluster from definition files and serve until Ctrl-C.")
    up.add_argument("files", nargs="+", type=Path, metavar="FILE.py", help="definitions: sources, views, models")
    up.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="folder of the models' artifacts (default: beside each file)"
    )
    deploy = command(
        "deploy", _deploy, "Add views and models to the running cluster; they are checked before anything changes."
    )
    deploy.add_argument("file", type=Path, metavar="FILE.py")
    deploy.add_argument("--model", action="append", default=[], metavar="NAME", help="only this one of the file")
    deploy.add_argument("--as", dest="role", choices=["champion", "canary", "shadow"], default="champion",
                        help="answers (default), answers a share of the ids, or only computes")  # fmt: skip
    deploy.add_argument("--share", help="of a canary: `5%%` or `0.05` of the ids")
    deploy.add_argument("--try", dest="ids", action="append", default=[], metavar="ID",
                        help="an id to check the models on, as JSON (default: one that nobody knows)")  # fmt: skip
    deploy.add_argument("--seconds-max", type=float, default=60.0, help="how long the check may take (default: 60)")
    deploy.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="folder of the models' artifacts (default: beside the file)"
    )
    deploy.add_argument("--json", action="store_true", help="print it as JSON")
    for name, about in (
        ("promote", "Make a model's canary or shadow, or a version, its champion."),
        ("rollback", "Make a model's rollout what it was before the last change."),
        ("retire", "Take a version of a model, or the whole model, out of service for ever."),
    ):
        change = command(name, _change, about)
        change.add_argument("model", metavar="MODEL")
        if name != "rollback":
            change.add_argument("version", nargs="?", metavar="VERSION")
        if name == "promote":
            change.add_argument("--verified", action="store_true",
                                help="only if logged scores of it are equal when they are computed again")  # fmt: skip
            change.add_argument("--verified-min", type=int, default=100, metavar="N",
                                help="so many of them at least (default: 100)")  # fmt: skip
        change.set_defaults(change=name)
    pool = command("pool", _pool, "Give a model replicas of its own, or take them away.")
    pool.add_argument("model", metavar="MODEL")
    pool.add_argument("--own-replicas", type=int, default=1, help="how many, or with --own-replicas-max at least")
    pool.add_argument("--own-replicas-max", type=int, help="as many as the load asks for, up to this")
    pool.add_argument("--cpus", type=float, default=1.0, help="of each replica")
    pool.add_argument("--none", action="store_true", help="back to the replicas of all models, or its own declaration")
    models = command("models", _models, "Show the models, who owns them and how they do; of one: all that is known.")
    models.add_argument("model", nargs="?", metavar="MODEL")
    models.add_argument("--json", action="store_true", help="print it as JSON")
    features = command("features", _features, "Show the views of a definition file, and what they take of memory.")
    features.add_argument("file", type=Path, metavar="FILE.py")
    features.add_argument("--json", action="store_true", help="print it as JSON")
    train = command("train-set", _train_set, "For each label the features that the cluster would have served at its "
                    "time: Parquet in, the same with features beside out.")  # fmt: skip
    train.add_argument("file", type=Path, metavar="FILE.py")
    train.add_argument("--model", metavar="NAME", help="whose features (default: the one model of the file)")
    train.add_argument("--labels", type=Path, required=True, metavar="FILE.parquet",
                       help="ids, the time of each, and any other columns")  # fmt: skip
    train.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.parquet")
    train.add_argument("--as-of", default="as_of", metavar="COLUMN", help="the labels' time (default: as_of)")
    train.add_argument("--knowledge", choices=["event-time", "arrival"], default="event-time",
                       help="a label knows what had happened by its time (default), or what had arrived")  # fmt: skip
    train.add_argument("--events", action="append", default=[], metavar="SOURCE=FILE.parquet",
                       help="raw events, for each source, instead of those of the cluster")  # fmt: skip
    train.add_argument("--incomplete", action="store_true",
                       help="take labels, too, that look back to what retention has deleted")  # fmt: skip
    train.add_argument("--threads", type=int, metavar="N", help="computed by so many (default: one for each core)")
    train.add_argument("--ray", metavar="ADDRESS",
                       help="computed by workers of a Ray cluster instead of threads: HOST:PORT, or "
                       "`up` for that of the running `millpond up`")  # fmt: skip
    train.add_argument("--json", action="store_true", help="print where it comes from as JSON")
    status = command("status", _status, "Show what the running cluster holds.")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    command("down", _down, "Stop the running cluster cleanly.")
    check = command("check", _check, "Check the directory of a stopped cluster; exits with 0 if all is well, 1 after "
                    "problems, 2 if it cannot be checked.")  # fmt: skip
    check.add_argument("directory", type=Path, metavar="DIR", help="data_dir/name of the cluster")
    check.add_argument("files", nargs="*", type=Path, metavar="FILE.py",
                       help="definitions: snapshots are compared with a replay, losses name views and ids")  # fmt: skip
    check.add_argument("--fix", action="store_true",
                       help="drop what is proven damaged, and list what is lost; needs --copy")  # fmt: skip
    check.add_argument("--copy", type=Path, metavar="COPYDIR",
                       help="a whole copy of DIR: made if it does not exist, then compared byte for byte")  # fmt: skip
    check.add_argument("--json", action="store_true", help="print it as one JSON object")
    export = command("export", _export, "Write a pack: events, definitions and live models, to replay elsewhere.")
    export.add_argument("files", nargs="*", type=Path, metavar="FILE.py",
                        help="definitions of the cluster (default: those it runs with)")  # fmt: skip
    export.add_argument("-o", "--output", type=Path, required=True, metavar="PACK", help="the folder, which is made")
    export.add_argument("--since", metavar="TIME", help="events that arrived then or later")
    export.add_argument("--until", metavar="TIME", help="events that arrived before")
    export.add_argument("--entities", type=Path, metavar="CSV", help="only events of these: columns are key fields")
    export.add_argument("--mask", action="append", default=[], metavar="FIELD,...", help="replace the values, by a key")
    export.add_argument("--drop", action="append", default=[], metavar="FIELD,...", help="leave the values out")
    export.add_argument("--mask-key-file", type=Path, metavar="FILE",
                        help="the key of masks, made if it is not there (default: a new one, not kept)")  # fmt: skip
    export.add_argument("--allow-personal", action="store_true", help="personal fields may leave as they are")
    export.add_argument("--json", action="store_true", help="print what is in it as JSON")
    replay = command("replay", _replay, "Play the events of a pack into a cluster, as they arrived.")
    replay.add_argument("pack", type=Path, metavar="PACK")
    replay.add_argument("--to", metavar="URL", help="where a cluster serves (default: the one of this configuration)")
    replay.add_argument("--speed", default="max", help="how much quicker than it was, `100x`, or `max` (default)")
    replay.add_argument("--as-of", choices=["arrival", "event"], default="arrival",
                        help="events arrive when they did, or when they happened")  # fmt: skip
    replay.add_argument("--token-file", type=Path, metavar="FILE", help="the admin token of a cluster elsewhere")
    replay.add_argument("--deploy", action="store_true", help="deploy the models of the pack first, if it runs here")
    replay.add_argument("--json", action="store_true", help="print what became of the events as JSON")
    verify = command("verify", _verify, "Compute logged scores again from the past, and compare; exits with 1 if some "
                     "differ.")  # fmt: skip
    verify.add_argument("--model", metavar="MODEL", help="only the scores of this model")
    verify.add_argument("--model-version", metavar="VERSION", help="only those of this version of it")
    verify.add_argument("--since", metavar="TIME",
                        help="only those served since: ISO 8601 with a zone, ms, or how long ago (`24h`)")  # fmt: skip
    verify.add_argument("--limit", type=int, metavar="N", help="only the newest N")
    verify.add_argument("--verified-min", type=int, default=0, metavar="N",
                        help="exit with 1 unless so many are equal, as where nothing is logged")  # fmt: skip
    verify.add_argument("--json", action="store_true", help="print it as one JSON object")
    explain = command("explain", _explain, "Show what made a score: each feature, its owner, its raw events. Any field "
                      "of the id is a flag: `--user-id 42`.")  # fmt: skip
    explain.allow_abbrev = False
    explain.add_argument("model", metavar="MODEL")
    explain.add_argument("--key", metavar="ID", help="the id as JSON, where a field has the name of a setting")
    explain.add_argument("--at", metavar="TIME", help="of the newest logged score up to then, or if there is none of "
                         "the one that there would have been: ISO 8601 with a zone, ms, or how long ago")  # fmt: skip
    explain.add_argument("--model-version", metavar="VERSION", help="by this version (default: that which answers)")
    explain.add_argument("--events", type=int, default=5, metavar="N", help="events shown of a feature (default: 5)")
    explain.add_argument("--json", action="store_true", help="print it as one JSON object")
    forget = command("forget", _forget, "Forget an entity: its rows, logged scores, and whose its events were. Its key "
                     "field is a flag: `--user-id 42`.")  # fmt: skip
    forget.allow_abbrev = False
    forget.add_argument("--key", metavar="ID", help="the id as JSON, where the field has the name of a setting")
    forget.add_argument("--status", action="store_true", help="only say how far it is")
    forget.add_argument("--json", action="store_true", help="print it as one JSON object")
    command("config", _config, "Print every setting and where its value came from.")
    add_bench_arguments(command("bench", run_bench, "Measure; the figures stand in the README under Measured."))
    for name, sub in commands.choices.items():  # behind what is its own
        _add_settings(sub, shown=name in _STARTS)
    return parser


def _demo(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.demo.churn import run_churn
    from millpond.cluster.demo.flight_delay import run_flight_delay
    from millpond.cluster.demo.fraud import run_fraud
    from millpond.cluster.demo.recommend import run_recommend

    run = {"flights": run_flight_delay, "churn": run_churn, "recommend": run_recommend, "fraud": run_fraud}[
        options.dataset
    ]
    return run(config, origins, as_json=options.json, keep=options.keep)


def _up(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.cluster import Cluster
    from millpond.deployments.deployment import Deployment
    from millpond.models.definition import Definition

    definitions = [Definition.read(path, options.artifacts) for path in options.files]
    print(f"starting cluster `{config.name}` in {config.directory} ...", file=sys.stderr)
    with Cluster(config, definitions) as cluster:
        assert cluster.registry is not None
        models, broken = sorted(cluster.registry.rollouts()), cluster.broken_models()
        down = "millpond down" + (f" --name {config.name}" if config.name != Config.name else "")
        print(f"serving {cluster.url}  (calls: {cluster.url}/docs; stop: Ctrl-C or `{down}`)")
        for source in cluster.layout.sources:
            print(f"  POST /v1/events/{source}")
        for model in models:
            print(f"  POST /v1/score/{model}" + (f"  BROKEN: {broken[model]}" if model in broken else ""))
        for own in (own for d in definitions for own in d.instances(Deployment)):
            print(f"  {own.route_prefix}  (deployment {own.name}, {own.owner})")
        sys.stdout.flush()
        cluster.wait()
        print("stopping ...", file=sys.stderr)
    return 0


def _deploy(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.deploy import share_of
    from millpond.cluster.model_commands import deploy_file, ids_of, print_deployed

    deployed = deploy_file(
        config,
        options.file,
        artifacts_dir=options.artifacts,
        only=options.model,
        as_=options.role,
        share=None if options.share is None else share_of(options.share),
        ids=ids_of(options.ids),
        seconds_max=options.seconds_max,
    )
    if options.json:
        print(json.dumps(deployed))
    else:
        print_deployed(deployed)
    return 0


def _change(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.model_commands import change_model

    verified = options.verified_min if getattr(options, "verified", False) else None
    print(change_model(config, options.change, options.model, getattr(options, "version", None), verified=verified))
    return 0


def _pool(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.model_commands import change_model
    from millpond.models import Pool

    pool = None if options.none else Pool(options.own_replicas, options.cpus, options.own_replicas_max)
    print(change_model(config, "pool", options.model, pool=pool))
    return 0


def _models(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.model_commands import describe_models, print_model, print_models

    described = describe_models(config, options.model)
    if options.json:
        print(json.dumps(described))
    elif options.model is None:
        print_models(described)
    else:
        print_model(described)
    return 0


def _features(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.features import describe_views, print_views
    from millpond.models.definition import Definition

    views = describe_views(Definition.read(options.file).declared())
    if options.json:
        print(json.dumps([asdict(view) for view in views]))
    else:
        print_views(views)
    return 0


def _clear_away_at_the_end() -> None:
    """Have what is half-written cleared away when the command is told to end, as it is at Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _train_set(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.train_set import make_training_set, summary

    _clear_away_at_the_end()
    made = make_training_set(
        config,
        options.file,
        model=options.model,
        labels=options.labels,
        out=options.out,
        events=options.events,
        as_of=options.as_of,
        knowledge=options.knowledge,
        incomplete=options.incomplete,
        threads=options.threads,
        ray=options.ray,
    )
    if options.json:
        print(json.dumps(made))
    else:
        print(f"{options.out}: {summary(made)}")
    return 0


def _status(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.cluster import running_cluster
    from millpond.cluster.status import fetch_status, print_status

    status = fetch_status(running_cluster(config), config.directory)
    if options.json:
        print(json.dumps(status))
    else:
        print_status(status)
    return 0


def _check(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.check import check_directory
    from millpond.feature_actors.check import CannotCheck
    from millpond.models.definition import Definition

    try:
        definitions = [Definition.read(path) for path in options.files]
        report = check_directory(options.directory, config, definitions, fix=options.fix, copy=options.copy)
    except (CannotCheck, MillpondError, OSError) as error:
        if options.json:
            print(json.dumps({"directory": str(options.directory), "error": str(error), "status": 2}))
        print(f"millpond: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report.as_json()))
    else:
        for line in report.text():
            print(line)
    return report.status


def _export(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.packs.commands import export_command, names_of
    from millpond.cluster.packs.export import What
    from millpond.cluster.times import time_of

    _clear_away_at_the_end()
    what = What(
        since_ms=time_of("--since", options.since),
        until_ms=time_of("--until", options.until),
        entities=options.entities,
        mask=names_of(options.mask),
        drop=names_of(options.drop),
        allow_personal=options.allow_personal,
    )
    exported = export_command(config, options.files, what, options.mask_key_file, options.output)
    _print_each(exported, options.json)
    return 0


def _replay(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.packs.commands import replay_command

    replayed = replay_command(
        config,
        options.pack,
        to=options.to,
        speed=options.speed,
        as_of=options.as_of,
        token_file=options.token_file,
        deploy=options.deploy,
    )
    _print_each(replayed, options.json)
    return 0


def _print_each(values: dict[str, Any], as_json: bool) -> None:
    """Print values by name; what is empty only as JSON."""
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        if value not in ([], {}, None):
            items = [f"{k} {v:,}" for k, v in value.items()] if isinstance(value, dict) else value
            print(f"{name.replace('_', ' '):18}{', '.join(items) if isinstance(items, list) else items}")


def _verify(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.cluster import running
    from millpond.cluster.times import time_of
    from millpond.cluster.verify import print_verification, verify_cluster

    since_ms = time_of("--since", options.since)
    if running(config.directory) is not None:
        os.nice(19)  # it comes first
    found = verify_cluster(config, options.model, options.model_version, since_ms=since_ms, limit=options.limit)
    if options.json:
        print(json.dumps(found.as_json()))
    else:
        print_verification(found)
    if found.scores.equal < options.verified_min:
        print(
            f"millpond: {found.scores.equal:,} scores are equal, {options.verified_min:,} are needed", file=sys.stderr
        )
    return 1 if found.scores.different or found.scores.equal < options.verified_min else 0


def _explain(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    import msgspec

    from millpond.cluster.explain import explain_score, key_of, print_explanation
    from millpond.cluster.times import time_of

    told = explain_score(
        config,
        options.model,
        key_of(options.rest, options.key),
        at_ms=time_of("--at", options.at),
        version=options.model_version,
        events_max=options.events,
    )
    if options.json:
        print(msgspec.json.encode(told).decode())  # NaN is null
    else:
        print_explanation(told)
    return 0


def _forget(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.explain import key_of
    from millpond.cluster.forget import forget_entity, told_in_words

    key = key_of(options.rest, options.key, "forget")
    told = forget_entity(config, key, only_look=options.status, say=lambda text: print(text, file=sys.stderr))
    print(json.dumps(told) if options.json else told_in_words(told))
    return 0 if told["state"] == "done" else 1


def _down(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    from millpond.cluster.cluster import running, running_cluster

    state = running_cluster(config)
    with contextlib.suppress(ProcessLookupError):  # it has ended just now
        os.kill(state["pid"], signal.SIGTERM)
    patience_s = float(state.get("stop_s_max", 120))
    deadline = time.monotonic() + patience_s
    while running(config.directory) is not None:
        if time.monotonic() > deadline:
            raise Unavailable(f"cluster `{config.name}` (process {state['pid']}) did not stop within {patience_s:g} s")
        time.sleep(0.1)
    print(f"cluster `{config.name}` has stopped")
    return 0


def _config(options: argparse.Namespace, config: Config, origins: dict[str, str]) -> int:
    width = max(map(len, origins))
    for name, origin in origins.items():
        print(f"{name:{width}} = {json.dumps(getattr(config, name)):24} # {origin}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
