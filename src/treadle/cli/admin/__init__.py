"""`treadle admin`: what an operator decides and sees, asked of a running server with an admin key.

Every route of /admin/v1 has its command here; docs/admin.md has them side by side.
"""

from __future__ import annotations

import typer

from treadle.cli.admin import limits, pools, records, tenants

app = typer.Typer(
    help="Decide about tenants, keys, quotas, losses, pools and runs of a server; see what waits, what was done and "
    "what was used.\n\n"
    "The server is TREADLE_URL or --url, the admin key is in TREADLE_ADMIN_KEY or --key-file.",
    no_args_is_help=True,
)
for part in (tenants, limits, pools, records):
    part.add_to(app)

__all__ = ["app"]
