"""Write docker/grafana/dashboards/treadle.json, the dashboard that compose provisions.

    .venv/bin/python scripts/make_dashboard.py            writes
    .venv/bin/python scripts/make_dashboard.py --check    changes nothing, exits 1 when the file is not current

Panels are rows of (title, unit, [(expression, legend)]); a test parses every expression and looks its metrics up in the
registry, so that a metric that is renamed or dropped cannot leave an empty panel behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[1] / "docker" / "grafana" / "dashboards" / "treadle.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
HEIGHT = 7
COLUMNS = 24

# Every expression about pools is of those that are chosen above.
P = 'pool=~"$pool"'
R = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str = ""
    is_stat: bool = False
    is_stacked: bool = False
    width: int = 8


def rate(metric: str, by: str, labels: str = P) -> str:
    """Per second, summed over servers."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}{R}))"


def quantile(q: float, metric: str, by: str, labels: str = P) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{labels}}}{R})))"


def both(metric: str, by: str, legend: str, labels: str = P) -> tuple[tuple[str, str], ...]:
    """Median and 95th percentile."""
    return (
        (quantile(0.5, metric, by, labels), f"{legend} p50"),
        (quantile(0.95, metric, by, labels), f"{legend} p95"),
    )


def share(part: str, whole: str) -> str:
    """One counter's rate by another's, by pool."""
    return f"{rate(part, 'pool')} / {rate(whole, 'pool')}"


def mean(metric: str, by: str) -> str:
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


# `and on` keeps the processes that are treadle's own.
OURS = "and on (instance, job) treadle_build_info"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Health",
        (
            Panel("Pools ready", "short", ((f"max by (pool) (treadle_pool_ready{{{P}}})", "{{pool}}"),), is_stat=True),
            Panel(
                "Workers",
                "short",
                ((f"sum by (pool, state) (treadle_pool_workers{{{P}}})", "{{pool}} {{state}}"),),
                is_stat=True,
            ),
            Panel("Version", "short", (("count by (version) (treadle_build_info)", "{{version}}"),), is_stat=True),
            Panel("Server memory", "bytes", ((f"process_resident_memory_bytes {OURS}", "{{instance}}"),)),
            Panel(
                "Worker memory",
                "bytes",
                (
                    (f"treadle_worker_resident_bytes{{{P}}}", "{{pool}}#{{worker}}"),
                    (f"treadle_worker_device_bytes{{{P}}} > 0", "{{pool}}#{{worker}} device"),
                ),
            ),
            Panel("Server CPU", "short", ((f"rate(process_cpu_seconds_total{R}) {OURS}", "{{instance}} cores"),)),
            Panel(
                "Leader", "short", ((f"sum by (pool, instance) (treadle_pool_leader{{{P}}})", "{{pool}} {{instance}}"),)
            ),
        ),
    ),
    (
        "Queue",
        (
            # Every server reads the same table.
            Panel(
                "Waiting requests",
                "short",
                ((f"max by (pool, work) (treadle_queued_ops{{{P}}})", "{{pool}} {{work}}"),),
            ),
            Panel(
                "Waiting tokens",
                "short",
                ((f"max by (pool, work) (treadle_queued_tokens{{{P}}})", "{{pool}} {{work}}"),),
            ),
            Panel(
                "Waiting bytes", "bytes", ((f"max by (pool, work) (treadle_queued_bytes{{{P}}})", "{{pool}} {{work}}"),)
            ),
            Panel("Oldest request", "s", ((f"max by (pool) (treadle_queued_oldest_seconds{{{P}}})", "{{pool}}"),)),
            Panel("Wait for a worker", "s", both("treadle_wait_seconds", "pool, work", "{{pool}} {{work}}")),
            Panel(
                "Request to result (p95)",
                "s",
                ((quantile(0.95, "treadle_request_seconds", "kind"), "{{kind}}"),),
                "From the request's row to its stored result, by kind.",
            ),
        ),
    ),
    (
        "Clock",
        (
            Panel("Cycles per second", "ops", ((rate("treadle_cycles_total", "pool"), "{{pool}}"),)),
            Panel("Cycle time", "s", both("treadle_cycle_seconds", "pool", "{{pool}}")),
            Panel("Parts of a cycle (p95)", "s", ((quantile(0.95, "treadle_cycle_part_seconds", "part"), "{{part}}"),)),
            Panel(
                "Fill",
                "percentunit",
                ((mean("treadle_cycle_occupancy", "pool"), "{{pool}}"),),
                "Tokens in a cycle as a share of its budget. Low with a queue: requests wait for something else.",
            ),
            Panel("Trained tokens per second", "short", ((rate("treadle_trained_tokens_total", "pool"), "{{pool}}"),)),
            Panel(
                "Tokens per base forward",
                "short",
                ((share("treadle_trained_tokens_total", "treadle_base_forwards_total"), "{{pool}}"),),
                "How many tokens share one pass of the base model: what packing tenants together gains.",
            ),
            Panel("Runs on workers", "short", ((f"sum by (pool) (treadle_resident_runs{{{P}}})", "{{pool}}"),)),
        ),
    ),
    (
        "Sampling",
        (
            Panel("Sampled tokens per second", "short", ((rate("treadle_sampled_tokens_total", "pool"), "{{pool}}"),)),
            Panel(
                "Prompt tokens per second",
                "short",
                (
                    (rate("treadle_prompt_tokens_total", "pool"), "{{pool}} all"),
                    (rate("treadle_cached_prompt_tokens_total", "pool"), "{{pool}} from the cache"),
                ),
            ),
            Panel(
                "Prefix cache hits",
                "percentunit",
                ((share("treadle_cached_prompt_tokens_total", "treadle_prompt_tokens_total"), "{{pool}}"),),
            ),
            Panel("Samples running", "short", ((f"sum by (pool) (treadle_running_samples{{{P}}})", "{{pool}}"),)),
            Panel("Sample to result", "s", both("treadle_request_seconds", "pool", "{{pool}}", f'{P}, kind="sample"')),
            Panel(
                "Samples per second",
                "ops",
                ((rate("treadle_finished_requests_total", "pool", f'{P}, kind="sample"'), "{{pool}}"),),
            ),
        ),
    ),
    (
        "Recovery",
        (
            Panel(
                "Worker deaths",
                "short",
                ((f"sum by (pool) (increase(treadle_worker_deaths_total{{{P}}}[1h]))", "{{pool}}"),),
            ),
            Panel(
                "Restores and replays per second",
                "ops",
                (
                    (rate("treadle_restores_total", "pool"), "{{pool}} restores"),
                    (rate("treadle_replayed_ops_total", "pool"), "{{pool}} replayed requests"),
                ),
            ),
            Panel("Time of a recovery", "s", ((quantile(0.95, "treadle_recovery_seconds", "pool"), "{{pool}} p95"),)),
            Panel(
                "Replay debt",
                "s",
                ((f"max by (pool) (treadle_replay_debt_seconds{{{P}}})", "{{pool}}"),),
                "Seconds of work that a death now would cost the run it costs most.",
            ),
            Panel(
                "Snapshots",
                "s",
                (
                    (rate("treadle_snapshots_total", "pool"), "{{pool}} per second"),
                    (quantile(0.95, "treadle_snapshot_seconds", "pool"), "{{pool}} device seconds p95"),
                ),
            ),
            Panel(
                "Lease changes",
                "short",
                ((f"sum by (pool, change) (increase(treadle_lease_changes_total{{{P}}}[1h]))", "{{pool}} {{change}}"),),
            ),
        ),
    ),
    (
        "Gateway",
        (
            Panel(
                "Calls per second",
                "reqps",
                (("sum by (status) (rate(treadle_http_requests_total[$__rate_interval]))", "{{status}}"),),
                is_stacked=True,
            ),
            Panel(
                "Slowest routes (p95)",
                "s",
                (
                    (
                        "topk(8, histogram_quantile(0.95, sum by (le, route) "
                        "(rate(treadle_http_seconds_bucket[$__rate_interval]))))",
                        "{{route}}",
                    ),
                ),
                "Without those that wait by design.",
            ),
            Panel("Held calls", "short", (("sum by (until) (treadle_held_calls)", "until {{until}}"),)),
            Panel(
                "Refusals per second",
                "ops",
                (
                    (
                        "sum by (error, status) (rate(treadle_refused_calls_total[$__rate_interval]))",
                        "{{status}} {{error}}",
                    ),
                ),
            ),
            Panel(
                "Logins and connections refused",
                "ops",
                (
                    ("sum(rate(treadle_failed_logins_total[$__rate_interval]))", "unknown keys"),
                    ("sum by (reason) (rate(treadle_refused_connections_total[$__rate_interval]))", "{{reason}}"),
                ),
            ),
            Panel(
                "Used per hour",
                "short",
                (("sum by (kind, base_model) (increase(treadle_used_total[1h]))", "{{base_model}} {{kind}}"),),
                "As it is billed.",
            ),
        ),
    ),
    (
        "Failures",
        (
            Panel(
                "Failed requests per second",
                "ops",
                ((rate("treadle_failed_requests_total", "kind, category"), "{{category}} {{kind}}"),),
            ),
            Panel(
                "Failed by our fault",
                "percentunit",
                (
                    (
                        rate("treadle_failed_requests_total", "pool", f'{P}, category="server"')
                        + " / "
                        + rate("treadle_finished_requests_total", "pool"),
                        "{{pool}}",
                    ),
                ),
            ),
            Panel(
                "Refused at admission per second",
                "ops",
                ((rate("treadle_refused_requests_total", "kind"), "{{kind}}"),),
            ),
            Panel(
                "Unexpected errors",
                "short",
                (("sum by (boundary) (increase(treadle_caught_errors_total[1h]))", "{{boundary}}"),),
            ),
        ),
    ),
    (
        "Store",
        (
            Panel("Commit time", "s", both("treadle_store_commit_seconds", "instance", "{{instance}}", 'job=~".+"')),
            Panel(
                "Writes per commit",
                "short",
                (
                    (
                        "sum(rate(treadle_store_commit_writes_sum[$__rate_interval])) "
                        "/ sum(rate(treadle_store_commit_writes_count[$__rate_interval]))",
                        "mean",
                    ),
                    ("max by (instance) (treadle_store_pending_writes)", "{{instance}} waiting"),
                ),
            ),
            Panel(
                "Failed commits",
                "short",
                (("sum by (instance) (increase(treadle_store_failed_commits_total[1h]))", "{{instance}}"),),
            ),
            Panel("Swept per hour", "short", (("sum by (what) (increase(treadle_swept_total[1h]))", "{{what}}"),)),
            Panel(
                "Time of a round of sweeps",
                "s",
                (("histogram_quantile(0.95, sum by (le) (rate(treadle_sweep_seconds_bucket[1h])))", "p95"),),
            ),
            Panel(
                "Since the last round",
                "s",
                (("time() - max by (instance) (treadle_last_sweep_timestamp_seconds > 0)", "{{instance}}"),),
            ),
        ),
    ),
)


def dashboard() -> dict[str, object]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, object]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(0, top, COLUMNS, 1),
            }
        )
        top += 1
        left = 0
        for panel in row:
            if left + panel.width > COLUMNS:
                left, top = 0, top + HEIGHT
            panels.append(_panel(panel, len(panels) + 1, _at(left, top, panel.width, HEIGHT)))
            left += panel.width
        top += HEIGHT
    return {
        "uid": "treadle",
        "title": "treadle",
        "tags": ["treadle"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_variable(), _pool_variable()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _at(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, object]:
    custom = {"fillOpacity": 20 if panel.is_stacked else 0, "showPoints": "never"}
    if panel.is_stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}  # type: ignore[assignment]
    return {
        "id": number,
        "type": "stat" if panel.is_stat else "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {} if panel.is_stat else custom},
            "overrides": [],
        },
        "options": {} if panel.is_stat else {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _source_variable() -> dict[str, object]:
    return {
        "name": "source",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "Prometheus", "value": "prometheus"},
    }


def _pool_variable() -> dict[str, object]:
    query = "label_values(treadle_pool_ready, pool)"
    return {
        "name": "pool",
        "label": "Pool",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "pools"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    """The file as it should be."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the file is not current")
    if FILE.is_file() and FILE.read_text(encoding="utf-8") == text():
        return 0
    if parser.parse_args().check:
        print(f"not current: {FILE.name}")
        return 1
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")
    print(f"written: {FILE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
