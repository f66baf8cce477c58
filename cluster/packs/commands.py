"""The commands of packs: `millpond export` and `millpond replay`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from millpond.cluster.cluster import admin_token, running, running_cluster
from millpond.cluster.config import Config
from millpond.cluster.model_commands import deploy_file, open_registry
from millpond.cluster.packs.export import What, export_pack
from millpond.cluster.packs.masking import read_key
from millpond.cluster.packs.pack import Pack, PackModel
from millpond.cluster.packs.replay import Pace, replay, speed_of
from millpond.deployments import Client
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.past import Past
from millpond.models.definition import Definition

__all__ = ["export_command", "names_of", "replay_command"]

#: A cluster that is being started or recovers is waited for so long.
_RETRY_S = 120.0


def names_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Return names that are separated by commas, or given one by one."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def export_command(
    config: Config, files: Sequence[Path], what: What, mask_key_file: Path | None, folder: Path
) -> dict[str, Any]:
    """Export a pack of the cluster and return what is in it. files: its definitions, if it does not run."""
    directory = config.directory
    if files:
        definitions = [Definition.read(path) for path in files]
    else:
        state = running_cluster(config, "export", "name its definition files, or start it")
        definitions = [Definition(name, text) for name, text in state["definitions"]]
    if mask_key_file is not None:
        if mask_key_file.resolve().is_relative_to(folder.resolve()):
            raise BadRequest(f"--mask-key-file: `{mask_key_file}` lies in the pack; keep the key out of it")
        what = replace(what, mask_key=read_key(mask_key_file))
    with ExitStack() as stack:
        has_models = (directory / "registry").is_dir()
        registry = stack.enter_context(open_registry(config)) if has_models else None
        progress = stack.enter_context(_progress("events", None))
        manifest = export_pack(Past(directory, config.history_uri), definitions, registry, folder, what, progress)
    return {
        "pack": str(folder),
        "events": manifest.events,
        "sources": {name: source.events for name, source in manifest.sources.items()},
        "left_out": manifest.left_out,
        "disputed": manifest.disputed,
        "masked": manifest.masked,
        "dropped": manifest.dropped,
        "changed_features": manifest.changed_features,
        "models": [f"{m.model}@{m.version} ({m.role})" for m in manifest.models],
    }


def replay_command(
    config: Config, folder: Path, *, to: str | None, speed: str, as_of: str, token_file: Path | None, deploy: bool
) -> dict[str, Any]:
    """Replay a pack and return what became of its events. to: a URL; None for the cluster that runs here."""
    if to is not None and not to.startswith(("http://", "https://")):
        raise BadRequest(f"--to: got {to!r:.80}; allowed is http://HOST:PORT or https://HOST:PORT")
    pace, pack = Pace(speed_of(speed)), Pack(folder)
    state = running(config.directory)
    if to is None:
        to = str(running_cluster(config, "replay", "start it, or say --to URL")["url"])
    is_here = state is not None and to.rstrip("/") == state["url"]
    token = _token_in(token_file) if token_file else admin_token(config.directory) if is_here else None
    deployed = _deployed(config, pack) if deploy and is_here else []
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if pack.manifest.models and not deployed:
        console.print("models of the pack, to deploy where the cluster runs:")
        for model in pack.manifest.models:
            console.print(f"  {_deploy_line(pack, model)}")
    with (
        Client(to, admin_token=token, retry_s=_RETRY_S) as client,
        _progress("events", pack.manifest.events) as progress,
    ):
        ack = replay(pack, client, pace, "event" if as_of == "event" else "given", progress)
    return {"to": to, "events": pack.manifest.events, **asdict(ack), "deployed": deployed}


def _token_in(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadRequest(f"--token-file: `{file}` cannot be read: {why}") from None


def _deployed(config: Config, pack: Pack) -> list[str]:
    """Deploy the models of a pack to the cluster here, champions first, each as what it was."""
    roles = ("champion", "canary", "shadow")
    models = sorted(pack.manifest.models, key=lambda model: roles.index(model.role))
    for one in models:
        share = one.share if one.role == "canary" else None
        deploy_file(config, pack.folder / one.definition, only=[one.model], as_=one.role, share=share)
    return [f"{one.model}@{one.version} ({one.role})" for one in models]


def _deploy_line(pack: Pack, model: PackModel) -> str:
    share = f" --share {model.share}" if model.role == "canary" else ""
    file, name = shlex.quote(str(pack.folder / model.definition)), shlex.quote(model.model)
    return f"millpond deploy {file} --model {name} --as {model.role}{share}"


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how far something is; give what it is told by."""
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)
