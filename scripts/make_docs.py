"""Write what is made from code in docs/: configuration.md from the Settings tree, metrics.md from the registry, the
operations in custom-losses.md, openapi.json from the routes.

    .venv/bin/python scripts/make_docs.py            writes
    .venv/bin/python scripts/make_docs.py --check    changes nothing, exits 1 when a page is not current

A test runs the check, so that a setting or a route and its documentation cannot part.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

from prometheus_client import CollectorRegistry

from treadle.config import FieldDoc, Settings, field_docs
from treadle.domain import custom_loss_names as names
from treadle.gateway.app import api_document
from treadle.telemetry.metrics import Metrics

DOCS = Path(__file__).parents[1] / "docs"

HEAD = """\
<!-- Made by scripts/make_docs.py from src/treadle/config/tree.py. Edit there, then run the script. -->
# Configuration

treadle starts with no configuration at all: SQLite, local files and the bundled tiny model, on 127.0.0.1:8000.

Values come from four places, the later wins:

1. the defaults below
2. a TOML file, `treadle serve --config my.toml`
3. the environment, `TREADLE_SECTION__FIELD`, for example `TREADLE_SERVER__PORT=9000`; lists are JSON; an empty value
   counts as not set
4. flags of the command line

An unknown key is an error that names the nearest known one. `treadle config show` prints every value and where it came
from, with passwords masked.

```toml
data_dir = "/srv/treadle"
models = ["treadle/tiny", "mine=/models/my-finetune"]

[server]
host = "127.0.0.1"
port = 8000

[scheduler]
gather_window_ms = 10
```

A model may also be a table, which has room for a revision:

```toml
[[models]]
name = "Qwen/Qwen3-0.6B"
source = "Qwen/Qwen3-0.6B"
revision = "main"
```

A pool is named by `NAME=`, else by the hub name, else `local/<directory name>`. A path is what starts with `/`, `./`,
`../` or `~`, or an existing directory with a `config.json`. Names with exactly two slashes are refused, because the SDK
cuts them when it loads a tokenizer.
"""


def configuration_page() -> str:
    """docs/configuration.md as it should be."""
    parts = [HEAD]
    for section, docs in groupby(field_docs(), key=lambda doc: doc.key.partition(".")[0] if "." in doc.key else ""):
        if section:
            annotation = Settings.model_fields[section].annotation
            parts.append(f"## {section}\n\n{(annotation.__doc__ or '').strip()}\n")
        else:
            parts.append("## Top level\n")
        parts.append("| setting | type | default | what it is |\n|---|---|---|---|")
        parts += [_row(doc) for doc in docs]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _row(doc: FieldDoc) -> str:
    default = f"`{doc.default_text}`" if doc.default_text else "(empty)"
    text = doc.text.replace("|", "\\|")
    return f"| `{doc.key}`<br>`{doc.variable}` | {doc.type_text} | {default} | {text} |"


def custom_losses_page() -> str:
    """docs/custom-losses.md with the operations as they should be; the rest of it is written by hand."""
    head, begin, rest = (DOCS / "custom-losses.md").read_text(encoding="utf-8").partition("<!-- operations: ")
    comment, _, rest = rest.partition("-->\n")
    _, end, tail = rest.partition("<!-- end of operations -->")
    groups = {
        "`torch.NAME(x, ...)` and `x.NAME(...)`": names.FUNCTIONS_AND_METHODS,
        "`torch.NAME(...)`": names.TORCH_FUNCTIONS,
        "`x.NAME(...)`": names.TENSOR_METHODS,
        "`torch.nn.functional.NAME(...)`": names.NN_FUNCTIONS,
        "`torch.special.NAME(...)`": names.SPECIAL_FUNCTIONS,
        "`math.NAME(number)`": names.MATH_FUNCTIONS,
        "Python's operators, by their names in `operator`": names.OPERATORS,
        "attributes": names.ATTRIBUTES,
        "dtypes": names.DTYPES,
    }
    table = ["", "| form | names |", "|---|---|"]
    table += [f"| {form} | {' '.join(f'`{name}`' for name in sorted(group))} |" for form, group in groups.items()]
    return "\n".join([f"{head}{begin}{comment}-->", *table, "", f"{end}{tail}"])


def openapi_page() -> str:
    """docs/openapi.json as it should be: what the server serves at /openapi.json."""
    return json.dumps(api_document(), indent=1, ensure_ascii=False) + "\n"


METRICS_HEAD = """\
<!-- Made by scripts/make_docs.py from src/treadle/telemetry/metrics.py. Edit there, then run the script. -->
# Metrics

`GET /metrics` of every server answers Prometheus text about that server; [telemetry.md](telemetry.md) says who may ask,
what to watch and when to be woken. Names are as Prometheus stores them. A label's values are pools (base models, named
by the operator), kinds of requests, route templates and fixed words; never a tenant, an id or anything else that a
client chose. `process_*` (memory, CPU, open files of the server's process) and `python_gc_*` are there as every Python
service has them.
"""


def metrics_page() -> str:
    """docs/metrics.md as it should be."""
    parts = [METRICS_HEAD]
    for section, docs in groupby(Metrics(CollectorRegistry()).docs, key=lambda doc: doc.section):
        parts.append(f"## {section}\n\n| metric | type | labels | what it is |\n|---|---|---|---|")
        for doc in docs:
            names = f"`{doc.names[0]}`" + "".join(f", `_{name.rpartition('_')[2]}`" for name in doc.names[1:])
            labels = ", ".join(f"`{label}`" for label in doc.labels)
            parts.append(f"| {names} | {doc.kind} | {labels} | {doc.text} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


PAGES = {
    DOCS / "configuration.md": configuration_page,
    DOCS / "metrics.md": metrics_page,
    DOCS / "custom-losses.md": custom_losses_page,
    DOCS / "openapi.json": openapi_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is not current")
    check = parser.parse_args().check
    stale = []
    for path, page in PAGES.items():
        text = page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'not current' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
