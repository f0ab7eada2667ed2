"""Measurements that need no model: jobs accepted a second, and the daemon at rest."""

from __future__ import annotations

import signal
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

from tests.bench.flood import Flood, Order, Outcome
from tests.bench.machine import Meter, commits, cpu_s, fdatasyncs, memory_mb, threads_cpu_s
from tests.bench.report import Goal, Report, Row
from tests.bench.rig import TOPICS, Asker, Daemon, broker
from tests.bench.scale import Scale
from tests.kit.daemon import MODEL

SUBMITTERS = 64
#: Jobs of one submitter under way at once: it publishes the next when one is accepted.
WINDOW = 1


def intake(folder: Path, scale: Scale, report: Report) -> None:
    """(e) Jobs accepted a second, from 64 connections, while the engine works on one job."""
    rates, syncs, rows, medians, worst = [], [], [], [], []
    runs = []
    for n in range(scale.flood_runs):
        place = folder / f"intake-{n}"
        place.mkdir()
        before = _disk(place, scale)
        outcome, facts = _flood_once(place, scale)
        after = _disk(place, scale)
        rate = outcome.accepted / (outcome.ended - outcome.began)
        rates.append(rate)
        syncs.append(statistics.mean((before["fdatasync"], after["fdatasync"])))
        rows.append(statistics.mean((before["commits"], after["commits"])))
        medians.append(1e3 * statistics.median(outcome.latencies))
        worst.append(1e3 * outcome.latencies[int(len(outcome.latencies) * 0.99)])
        runs.append({"rate": rate, "disk_before": before, "disk_after": after, **facts})
    report.details["intake"] = {"submitters": SUBMITTERS, "window": WINDOW, "runs": runs}
    report.noise["intake"] = [run["use"]["others"] for run in runs]
    shares = runs[-1]["use"]["cores"]
    note = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "bench")
    report.rows += [
        Row(key="e", what=f"jobs accepted a second, {SUBMITTERS} submitters", values=rates,
            unit="/s", goal=Goal(">=", 1000), note=f"of a core: {note}"),
        Row(key="", what="  publish to accepted, median", values=medians, unit="ms"),
        Row(key="", what="  publish to accepted, 99th percentile", values=worst, unit="ms"),
        Row(key="", what="  this disk: SQLite commits of one row", values=rows, unit="/s"),
        Row(key="", what="  this disk: fdatasync of 4 KiB", values=syncs, unit="/s"),
    ]  # fmt: skip


def _disk(place: Path, scale: Scale) -> dict[str, float]:
    return {
        "fdatasync": fdatasyncs(place, scale.disk_s),
        "commits": commits(place, scale.disk_s),
    }


def _flood_once(place: Path, scale: Scale) -> tuple[Outcome, dict[str, Any]]:
    limits = {"queue": 100_000, "journal_mb": 100_000}
    with (
        broker(place / "broker") as mosquitto,
        Daemon(place, mosquitto.port, faulty=True, limits=limits) as daemon,
    ):
        with Asker(mosquitto.port) as asker:
            asker.wait_ready(daemon)
            plug, _ = asker.send("plug", prompt="!sleep 600")
            asker.wait_for(plug, "started", daemon)
        pid = daemon.pid
        order = Order(
            port=mosquitto.port, root=TOPICS, submitters=SUBMITTERS, window=WINDOW,
            seconds=scale.flood_s,
        )  # fmt: skip
        with Flood(order) as flood:
            threads = threads_cpu_s(pid)
            pids = {"daemon": pid, "broker": mosquitto.pid, "submitters": flood.pid}
            with Meter(pids) as meter:
                outcome = flood.run()
            wall = meter.use.wall_s
            shares = {
                "event loop" if tid == pid else f"thread {tid - pid}": round(
                    (used - threads.get(tid, 0.0)) / wall, 4
                )
                for tid, used in threads_cpu_s(pid).items()
            }
        memory = memory_mb(pid)
        daemon.end(signal.SIGKILL)  # what was accepted must be there all the same
        stored = _stored(place / "state" / "journal.db")
    if outcome.accepted < outcome.published or stored < outcome.accepted + 1:
        raise RuntimeError(
            f"{outcome.published} published, {outcome.accepted} accepted, {stored} in the journal "
            f"(one is not of the flood); others: {outcome.others}"
        )
    return outcome, {
        "accepted": outcome.accepted,
        "stored": stored,
        "use": meter.use.as_dict(),
        "daemon_threads": shares,
        "daemon_memory_mb": memory,
        "us_of_cpu_a_job": {
            name: round(1e6 * share * wall / outcome.accepted, 1)
            for name, share in meter.use.cores.items()
        },
    }


def _stored(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        (count,) = database.execute("SELECT count(*) FROM job").fetchone()
    finally:
        database.close()
    return int(count)


def rest(folder: Path, scale: Scale, report: Report) -> None:
    """(f) What the daemon itself needs while nothing happens: connected, loaded, beating."""
    place = folder / "rest"
    with (
        broker(place / "broker") as mosquitto,
        Daemon(place, mosquitto.port, model={"path": str(MODEL)}) as daemon,
    ):
        with Asker(mosquitto.port) as asker:
            asker.wait_ready(daemon)
            asker.ask(daemon, "bench", prompt="a job that has run", max_tokens=16)
        pid = daemon.pid
        threads, before, began = threads_cpu_s(pid), cpu_s(pid), time.perf_counter()
        time.sleep(scale.rest_s)  # the window that is measured
        after, wall = cpu_s(pid), time.perf_counter() - began
        shares = {
            "event loop" if tid == pid else f"thread {tid - pid}": (used - threads.get(tid, 0.0))
            / wall
            for tid, used in threads_cpu_s(pid).items()
        }
        memory = memory_mb(pid)
    report.details["rest"] = {
        "seconds": wall,
        "memory_mb": memory,
        "threads_percent": {name: round(100 * share, 4) for name, share in shares.items()},
    }
    report.rows += [
        Row(key="f", what="daemon without its engine, resident memory", values=[memory["rss"]],
            unit="MB", goal=Goal("<=", 80),
            note=f"{memory['anonymous']:.0f} MB of it its own, {memory['file']:.0f} MB files"),
        Row(key="", what="daemon at rest, of one core", values=[100 * (after - before) / wall],
            unit="%", goal=Goal("<", 1)),
    ]  # fmt: skip
