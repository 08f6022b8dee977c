"""`treadle demo` from start to exit status. Invariant: 0 only when every check of the report passed."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from treadle.config import bypass_proxy_for
from treadle.demo.own_server import OwnServer
from treadle.demo.report import Plan, Report


def run_demo(*, url: str | None, plan: Plan) -> int:
    """The exit status: 0 when every check passed. url None starts a server and stops it at the end.

    Raises ServerError when that server does not start.
    """
    console, report, started = Console(emoji=False), Report(), time.monotonic()
    if url is None:
        _with_own_server(plan, console, report)
    else:
        _quickstart(url, plan, console, report)
    for claim in report.passed:
        console.print(f"[green]ok[/]   {escape(claim)}", highlight=False, soft_wrap=True)
    for claim in report.failed:
        console.print(f"[bold red]FAIL[/] {escape(claim)}", highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - started:.1f} s", style="dim", highlight=False)
    return 1 if report.failed else 0


def _with_own_server(plan: Plan, console: Console, report: Report) -> None:
    console.print(f"starting a server with {plan.model}", style="dim", highlight=False)
    server = OwnServer(plan.model)
    try:
        # Imported while the server starts: the SDK and transformers take as long to load as the server does.
        import treadle.demo.quickstart  # noqa: F401

        url = server.wait_until_ready()
        console.print(f"server at {url}", style="dim", highlight=False)
        _quickstart(url, plan, console, report)
    finally:
        status = server.stop()
    report.check(status == 0, f"the server stopped on SIGTERM with exit status {status}")
    if report.failed:
        console.print("the end of the server's log:", style="bold")
        console.print(server.log_tail(), highlight=False, markup=False, soft_wrap=True)


def _quickstart(url: str, plan: Plan, console: Console, report: Report) -> None:
    from treadle.demo.quickstart import SDK_ERRORS, quickstart

    bypass_proxy_for(urlsplit(url).hostname or "127.0.0.1")
    try:
        quickstart(url, plan, console, report)
    except SDK_ERRORS as error:
        report.check(False, f"the SDK failed: {str(error) or type(error).__name__}")
