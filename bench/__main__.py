"""`python -m bench`: how fast, how large, and whether all that was promised is kept.

Each sub-command prints a table, or writes JSON with --json, and exits with 1 when something that
was measured was wrong, however fast.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path

import msgspec

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "openclaw_site.settings")

BENCHES = ("wake", "workers", "latency", "connections", "queue", "cli", "start", "crash")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").strip())
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name in BENCHES:
        module = import_module(f"bench.{name}")
        sub = benches.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
        sub.add_argument(
            "--directory", type=Path, help="where databases are made, and removed; else with others"
        )
        sub.set_defaults(run=module.run)
    chart = benches.add_parser("chart", help="draw the ratios of reports as one SVG")
    chart.add_argument("reports", type=Path, nargs="+", metavar="FILE")
    chart.add_argument("--output", type=Path, default=Path("bench/chart.svg"))
    options = parser.parse_args()
    if options.bench == "chart":
        from bench.chart import draw

        options.output.write_text(
            draw({f.stem: msgspec.json.decode(f.read_bytes()) for f in options.reports})
        )
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        report = options.run(options, Path(directory))
    for line in report.lines():
        print(line)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if report.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
