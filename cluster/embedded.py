"""An embedded cluster: Ray and Serve of this machine only, started and stopped by one Python process.

Promises:
- Every socket is on the loopback interface, but for the HTTP port if `EmbeddedSettings.host` says so.
- Clusters of different run directories live side by side; one run directory runs one cluster.
- After `stop`, and after Ctrl-C or SIGTERM inside `with` or `wait`, no process, socket, temporary file
  or shared memory of the cluster is left. After SIGKILL Ray and HAProxy end by themselves in a few s, but
  for two agents of Ray; the next `start` in the same run directory ends these and clears the files away.
- When a process of Ray has died that nothing restarts, `wait` raises; the logs stay until the next `start`.
- Only processes that belong to this cluster are ever signalled, each by its id.

Three steps, so that whatever runs in Ray can start at once: `start` (Ray), `start_serve`, `run` (applications). One
cluster per process at a time: Ray allows no more. Start it from a thread that lives as long as the cluster (the main
thread, as a rule): the kernel ends Ray's processes when the *thread* that started them ends.

On 2 cores a start is some 12 s of processor time: Python and Ray are imported by each of eight processes. A stop takes
1 to 4 s, plus the draining period.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from millpond.cluster.scratch import Scratch, remove_abandoned
from millpond.cluster.serve_env import Proxy, serve_environment, write_launcher
from millpond.feature_actors.errors import MillpondError, Unavailable

__all__ = ["EmbeddedCluster", "EmbeddedSettings", "free_port", "log_of_ray", "signals_deferred"]

#: Namespace of the driver's named actors. Serve's own actors live in Serve's.
NAMESPACE = "millpond"

#: Longest path of the shelter: the longest socket below it is HAProxy's,
#: `<shelter>/<56 digits of a node id>/s`, and HAProxy allows 97 bytes of the 107 that the kernel does.
_SHELTER_BYTES_MAX = 36
_SHELTER_PREFIX = "mp-"

#: Where blocks of ports start: below what the kernel hands out (32768 and up), as to Ray's workers.
_PORTS = range(20_000, 32_600, 200)

#: How often Serve is asked whether applications run, and how long its proxies may take to start.
_POLL_S, _PROXIES_S_MAX = 0.05, 60.0
#: How long HAProxy is waited for to have its last configuration.
_PROXY_SETTLES_S_MAX = 15.0

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedSettings:
    """Say what an embedded cluster is to be.

    run_dir: a directory of this cluster's own; made, and set to mode 0700. Any length.
    port: the HTTP port that is tried first; if it is taken, or 0, a free one is chosen.
    proxy: "haproxy" is fast (section 8 of the design); "serve" is Serve's own proxy in Python.
    num_cpus: what actors and replicas may reserve in sum; None is the number of cores.
    object_store_mb: shared memory for Ray objects above 100 KB; reserved, not used until needed.
    draining_period_s: how long a replica that is replaced still takes requests; 0 in tests.
    """

    run_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    proxy: Proxy = "haproxy"
    num_cpus: int | None = None
    object_store_mb: int = 100
    draining_period_s: float = 2
    log_level: str = "WARNING"


class EmbeddedCluster:
    """Start and stop one embedded cluster; a context manager.

    `with EmbeddedCluster(settings) as cluster: cluster.start_serve(); cluster.run(targets); cluster.wait()` ends
    cleanly on Ctrl-C and SIGTERM.
    """

    def __init__(self, settings: EmbeddedSettings) -> None:
        self.settings = settings
        self.port = 0
        self.ports = range(0)
        self.shelter: Path | None = None
        self._scratch: Scratch | None = None
        self._lock: TextIO | None = None
        self._claims: list[socket.socket] = []
        self._proxies: list[Any] = []
        self._environment_before: dict[str, str | None] = {}

    @property
    def http_url(self) -> str:
        """Where requests go, `http://127.0.0.1:8000`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def address(self) -> str:
        """Ray's own address (its GCS), `127.0.0.1:43765`; reached only with the token in `shelter`."""
        import ray

        return str(ray.get_runtime_context().gcs_address)

    def start(self) -> EmbeddedCluster:
        """Start Ray, and return when actors can be started.

        1. Lock the run directory, and clear away what a killed predecessor left.
        2. Choose ports and a shelter; write them down for the successor.
        3. Set the environment.
        4. Start Ray.

        Raises `Unavailable` if the run directory is in use, `MillpondError` if this process is in a cluster.
        """
        self._lock_run_dir()
        try:
            # Before there is anything of ours: the `stop` below must not take away the cluster that is there.
            if "ray" in sys.modules and sys.modules["ray"].is_initialized():
                raise MillpondError("embedded cluster: this process is in a Ray cluster already; leave it first")
            self._clear_predecessor()
            _exit_on_sigterm()
            self._choose_ports()
            self.shelter = self._make_shelter()
            self._set_environment(self.shelter)
            self._start_ray(self.shelter)
        except BaseException:
            self.stop()
            raise
        return self

    def start_serve(self) -> None:
        """Start Serve, and return while its proxies are starting: `run` waits for them and the applications at once.

        After `start`; what else is to start in Ray can be started in between, and starts at the same time.
        """
        from ray.serve import context
        from ray.serve._private import api, client
        from ray.serve.config import ControllerOptions

        logging.getLogger("ray.serve").setLevel(self.settings.log_level)
        client.CLIENT_POLLING_INTERVAL_S = _POLL_S  # else it asks once a second whether applications run
        # What `serve.start` does, but for the wait.
        controller, self._proxies = api._create_controller_and_proxy_refs(
            # HAProxy mode binds every interface unless the host is passed explicitly.
            {"host": self.settings.host, "port": self.port},
            None,
            {"log_level": self.settings.log_level, "enable_access_log": False},
            None,
            ControllerOptions(),
        )
        context._set_global_client(client.ServeControllerClient(controller))

    def run(self, targets: Sequence[Any]) -> None:
        """Run applications (`serve.RunTarget`), and return when they answer at `http_url`. After `start_serve`."""
        import ray
        from ray import serve
        from ray.serve import context

        serve.run_many(targets, wait_for_applications_running=False)
        ray.get(self._proxies, timeout=_PROXIES_S_MAX)  # raises what a proxy has died of, such as a port that is taken
        client: Any = context._get_global_client()
        for target in targets:
            client._wait_for_application_running(target.name)
        try:
            client.wait_for_proxies_serving()
        except TimeoutError as error:
            raise Unavailable(
                f"embedded cluster: nothing answers at {self.http_url}: {error} Can `{self.settings.host}` be listened "
                "on?"
            ) from None
        if self.settings.proxy == "haproxy":
            self._wait_for_haproxy([target.name for target in targets])

    def _wait_for_haproxy(self, names: Sequence[str]) -> None:
        """Wait until one HAProxy runs, with the replicas of all applications.

        Serve gives it a new configuration for each application that comes up, and says before the last that it serves.
        Who connects to the one that is being replaced finds the connection closed.
        """
        deadline, before = time.monotonic() + _PROXY_SETTLES_S_MAX, None
        while time.monotonic() < deadline:
            settled = self._settled_haproxy(names)
            if (
                settled is not None and settled == before
            ):  # else a configuration may just have been written for the next
                return
            before = settled
            time.sleep(_POLL_S)
        _LOG.warning("HAProxy goes on changing %g s after it was ready", _PROXY_SETTLES_S_MAX)

    def _settled_haproxy(self, names: Sequence[str]) -> int | None:
        """Return the id of the only HAProxy there is, if its configuration has all applications."""
        assert self.shelter is not None
        pids = [pid for pid in _processes_of(self.shelter) if _is_haproxy(pid)]
        configs = list(self.shelter.glob("*/haproxy.cfg"))
        with contextlib.suppress(OSError):  # either may be replaced at any moment
            if len(pids) == len(configs) == 1 and Path(f"/proc/{pids[0]}/exe").readlink().name == "haproxy":
                text = configs[0].read_text()
                return pids[0] if all(f"SERVE_REPLICA_{name}-" in text for name in names) else None
        return None

    def stop(self) -> None:
        """Drain and end the applications, then Ray, then whatever is left. Harmless when not started."""
        with signals_deferred():
            broken = False
            try:
                if "ray" in sys.modules and self.shelter is not None:
                    # Without its raylet, Ray ends this process in the middle of a shutdown.
                    broken = self._ended_of_ray() is not None
                    if not broken:
                        self._stop_ray()
            finally:
                self._clear_away(broken)

    def wait(self) -> int:
        """Block until SIGINT or SIGTERM and return its number. Main thread only; a `stop` should follow.

        Raises `Unavailable` if a process of Ray has ended that nothing restarts: the cluster would stay as it is,
        half alive.
        """
        arrived: list[int] = []
        before = {s: signal.signal(s, lambda number, _: arrived.append(number)) for s in _END_SIGNALS}
        try:
            while not arrived:
                # Not signal.pause(): a signal between the test and the pause would be slept over.
                time.sleep(0.2)
                if (ended := self._ended_of_ray()) is not None:
                    raise Unavailable(
                        f"embedded cluster: Ray's `{ended}` has ended, and only a new start brings it back; start the "
                        "cluster again"
                    )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return arrived[0]

    def __enter__(self) -> EmbeddedCluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- steps of `start` --

    def _lock_run_dir(self) -> None:
        if self._lock is not None:
            raise MillpondError("embedded cluster: already started; stop it first")
        run_dir = self.settings.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)
        # The kernel gives the lock back when this process ends, however it ends: unlike a pid file.
        lock = (run_dir / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise Unavailable(
                f"embedded cluster: run directory `{run_dir}` is in use by a running cluster; "
                "stop that one, or use another directory"
            ) from None
        self._lock = lock

    @property
    def _record(self) -> Path:
        return self.settings.run_dir / "embedded.json"

    def _clear_predecessor(self) -> None:
        for root in _shelter_roots():
            remove_abandoned(
                root, _SHELTER_PREFIX, _may_be_started_again, functools.partial(_end_processes_of, patience_s=0.2)
            )
        try:
            left = Path(json.loads(self._record.read_text())["shelter"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        # The lock is ours, so the process that wrote this is dead. Its shelter may have been deleted and
        # the name given to someone else since: only a directory of ours, made by us, is taken away.
        with contextlib.suppress(OSError):  # gone already
            made_by_us = (left / "run_dir").is_symlink() and (left / "run_dir").samefile(self.settings.run_dir)
            if made_by_us and left.stat().st_uid == os.getuid():
                _LOG.warning("clearing away what a killed cluster left in %s", left)
                # Two agents of Ray outlive a killed raylet, and wait for it in vain.
                _end_processes_of(left, patience_s=0.2)
                shutil.rmtree(left, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    def _choose_ports(self) -> None:
        """Set `ports` and `port`, and claim both against other clusters that start just now."""
        starts = list(_PORTS)
        # The same block each time for one directory, if it can be.
        first = zlib.crc32(os.fsencode(self.settings.run_dir.absolute())) % len(starts)
        for start in starts[first:] + starts[:first]:
            block = range(start, start + _PORTS.step)
            if self._claim(start) and all(free_port("127.0.0.1", port) == port for port in block):
                self.ports = block
                break
        else:
            raise Unavailable("embedded cluster: no 200 free ports in a row for replicas")
        # Serve's own proxy binds without SO_REUSEADDR: for it a port that was just closed is taken.
        reuse = self.settings.proxy == "haproxy"
        for preferred in (self.settings.port or self.ports[-1], self.ports[-1], 0):
            self.port = free_port(self.settings.host, preferred, reuse=reuse)
            if preferred in (0, self.port) and self._claim(self.port):
                return

    def _claim(self, port: int) -> bool:
        # Eight seconds pass between choosing a port and HAProxy's binding it. A name in the abstract
        # namespace is a lock of exactly a port's scope (the network namespace), and dies with us.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0millpond-port-{port}")
        except OSError:
            claim.close()
            return False
        self._claims.append(claim)
        return True

    def _make_shelter(self) -> Path:
        roots = _shelter_roots()
        root = next((r for r in roots if len(os.fsencode(r)) + 12 <= _SHELTER_BYTES_MAX), roots[-1])
        self._scratch = Scratch(_SHELTER_PREFIX, root)
        shelter = self._scratch.path
        (shelter / "run_dir").symlink_to(self.settings.run_dir.absolute())
        beside = self._record.with_suffix(".tmp")
        beside.write_text(json.dumps({"pid": os.getpid(), "shelter": str(shelter), "http_url": self.http_url}))
        beside.replace(self._record)
        token = os.open(shelter / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(token, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32))
        if self.settings.proxy == "haproxy":
            write_launcher(shelter, self.settings.host)
        return shelter

    def _set_environment(self, shelter: Path) -> None:
        settings = self.settings
        environment = serve_environment(
            shelter,
            proxy=settings.proxy,
            draining_period_s=settings.draining_period_s,
            ports=self.ports,
        )
        self._environment_before = {name: os.environ.get(name) for name in (*environment, "RAY_ADDRESS")}
        os.environ.update(environment)
        os.environ.pop("RAY_ADDRESS", None)  # it would win over address="local"

    def _start_ray(self, shelter: Path) -> None:
        import ray
        from ray import _raylet
        from ray._private import ray_constants, worker

        # Ray read these when it was imported, or at an earlier start in this process. (What Serve reads when
        # it is imported matters in its actors only, which are born into the new environment.)
        ray_constants.ENABLE_RAY_CLUSTER = False
        # Ray prints to our stdout that a worker died, and at every stop that Serve's controller ended in the
        # middle of the call that asked it to.
        worker.print_to_stdstream = log_of_ray
        core: Any = _raylet
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()
        with _without_idle_servers():
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=self.settings.num_cpus,
                object_store_memory=self.settings.object_store_mb << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=self.settings.log_level,
                _temp_dir=str(shelter / "r"),
            )
        _exit_on_sigterm()  # `ray.init` has put a handler of its own, which prints a stack and dies

    @property
    def logs_dir(self) -> Path:
        """Where the processes of the running cluster write their logs; gone when it is stopped cleanly."""
        from ray._private import worker

        node: Any = worker._global_node
        return Path(node.get_logs_dir_path())

    def _ended_of_ray(self) -> str | None:
        """Return the name of a process of Ray that has ended and that nothing restarts, or None."""
        from ray._private import worker

        node: Any = worker._global_node
        dead = [name for name, _ in node.dead_processes()] if node is not None else []
        return next((name for name in ("gcs_server", "raylet") if name in dead), None)

    # -- steps of `stop` --

    def _stop_ray(self) -> None:
        import ray

        try:
            if ray.is_initialized():
                from ray import serve

                serve.shutdown()
        except Exception:  # a broken cluster must be taken away all the same
            _LOG.warning("Serve did not shut down cleanly", exc_info=True)
        finally:
            ray.shutdown()  # also ends what an interrupted `ray.init` has started

    def _clear_away(self, broken: bool) -> None:
        """End what is left, and take the files away; those of a `broken` cluster stay for who asks why."""
        if self._scratch is not None:
            _end_processes_of(self._scratch.path, patience_s=0.2 if broken else 5)
            if not broken:
                self._scratch.remove()
                self._record.unlink(missing_ok=True)
            self._scratch = self.shelter = None
        for name, value in self._environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment_before = {}
        while self._claims:
            self._claims.pop().close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextlib.contextmanager
def _without_idle_servers() -> Iterator[None]:
    """Have `ray.init` start no server that nobody here asks anything, and none on a port that others would want, too.

    The autoscaler, what brings logs to the driver, and what a dashboard leaves without a dashboard are an eighth of the
    work of a start. For the fixed port of its agent a second cluster of the machine would wait 4 s in vain.
    """
    from ray._private import node, parameter, ray_constants

    def no_dashboard(of: Any, **_: Any) -> None:
        # Where nobody listens; without an address the agent would look for one once a second, and log that in vain.
        space = ray_constants.KV_NAMESPACE_DASHBOARD
        of.get_gcs_client().internal_kv_put(ray_constants.DASHBOARD_ADDRESS.encode(), b"127.0.0.1:9", True, space)

    params, api_server = parameter.RayParams, node.Node.start_api_server
    quiet = {"no_monitor": True, "include_log_monitor": False, "dashboard_agent_listen_port": 0}
    parameter.RayParams = functools.partial(params, **quiet)
    node.Node.start_api_server = no_dashboard
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = params, api_server


def log_of_ray(printed: dict[str, Any], ignore_prefix: bool = False) -> None:
    """Log what Ray has its driver print, in place of `ray._private.worker.print_to_stdstream`."""
    _LOG.info("%s: %s", printed.get("pid"), "\n".join(printed.get("lines", [])))


def free_port(host: str, preferred: int = 0, *, reuse: bool = True) -> int:
    """Return `preferred` if it can be listened on at `host`, else a port that the kernel says is free.

    reuse: connections that were closed in the last minute do not make a port taken, only a listener does.
    Nothing holds the port until someone binds it.
    """
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Unavailable(f"no port of `{host}` can be listened on; is it an address of this machine?")


def _shelter_roots() -> list[Path]:
    return [Path(tempfile.gettempdir()), Path("/tmp")]


def _may_be_started_again(shelter: Path) -> bool:
    """Whether a shelter's cluster is clearing it away when it is started anew: its run directory is there."""
    return (shelter / "run_dir").exists()


def _is_haproxy(pid: int) -> bool:
    """Return whether a process is HAProxy, or about to be: the launcher becomes it."""
    with contextlib.suppress(OSError):
        names = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        return any(Path(name).name == "haproxy" for name in names[:5])
    return False


def _processes_of(shelter: Path) -> list[int]:
    """Return the ids of the processes of the cluster that lives in `shelter`.

    A process belongs to it if it runs Python, HAProxy or a program of Ray, and names a file of the shelter
    in its command line or has one open, as each process of Ray has its log. (Its environment would not
    do: Ray's workers overwrite theirs with their titles.)
    """
    inside = f"{shelter}/"
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        # A process may end, or be someone else's, at any step.
        with contextlib.suppress(OSError):
            if process.stat().st_uid != os.getuid():
                continue
            program = str((process / "exe").readlink())
            if not ("python" in program or "/ray" in program or "haproxy" in program):
                continue
            names = (process / "cmdline").read_text(errors="replace").split("\0")
            if any(inside in name for name in names) or any(
                str(file.readlink()).startswith(inside) for file in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
    return found


def _end_processes_of(shelter: Path, patience_s: float) -> None:
    """Wait so long for the processes of `shelter` to end; then ask them to; then make them."""
    for ask, wait_s in ((None, patience_s), (signal.SIGTERM, 2), (signal.SIGKILL, 2)):
        deadline = time.monotonic() + wait_s
        left = _processes_of(shelter)
        if ask is not None:
            for pid in left:
                _LOG.warning("process %d of the cluster in %s is left: %s", pid, shelter, ask.name)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, ask)
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = _processes_of(shelter)
        if not left:
            return


_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _exit_on_sigterm() -> None:
    """Make SIGTERM an exception, as SIGINT is one, so that `start` and `with` are unwound by it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextlib.contextmanager
def signals_deferred() -> Iterator[Sequence[int]]:
    """Let SIGINT and SIGTERM wait: a second Ctrl-C must not break off the clearing away. Yields those that arrived."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {s: signal.signal(s, note) for s in _END_SIGNALS}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
