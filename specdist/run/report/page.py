# SPDX-License-Identifier: Apache-2.0
"""`specdist report RUN_DIR ...`: one HTML file that needs nothing but a browser. plotly.js, which lies in it, draws."""

import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec

import specdist
from specdist.core.errors import ConfigError, UserError, say
from specdist.core.files import write_atomically
from specdist.run.report import tables
from specdist.run.report.charts import colour, make_charts
from specdist.run.report.run_records import RunRecords, read_runs

_DEFECTS = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, jinja2.TemplateError)
LACKS_PLOTLY = "the report is drawn by plotly, which is not installed: pip install plotly"


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of the runs in `directories` to `output` (default: report.html, in the only one), and return it.
    Raises ConfigError: there is nothing to show, the runs cannot be compared, or plotly is not installed. DataError: a
    file of a run cannot be read."""
    if output is None:
        output = (directories[0] if len(directories) == 1 else Path()) / "report.html"
    library = _plotly()
    page = _render(read_runs(directories), library).encode(errors="replace").decode()  # a path may be no text
    try:
        write_atomically(output, page)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error}") from error
    return output


def report_at_end(run_dir: Path) -> None:
    """Write the page of a run that has ended, RUN_DIR/report.html, and say so. What is wrong with it stops nothing."""
    try:
        path = write_report([run_dir])
        print(f"  report         {path}", file=sys.stderr, flush=True)  # below the lines of the summary
    except UserError as error:
        say(f"no report.html: {error}")
    except _DEFECTS as error:  # the run is done, and worth more than a page about it
        say(f"no report.html: {type(error).__name__}: {error}; `specdist report {run_dir}` shows where")


def _plotly() -> str:
    try:
        return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError(LACKS_PLOTLY) from error


def _render(runs: Sequence[RunRecords], library: str) -> str:
    charts = make_charts(runs)
    loader = jinja2.PackageLoader("specdist.run.report", ".")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    figures = {chart.id: {"data": chart.traces, "layout": chart.layout} for chart in charts}
    drafts = max((len(run.evaluation.total.forwards) for run in runs if run.evaluation), default=0)
    return page.get_template("page.html.j2").render(
        runs=runs,
        charts=charts,
        figures=jinja2.utils.markupsafe.Markup(_json(figures)),
        library=jinja2.utils.markupsafe.Markup(library),
        tables=tables,
        commands=[tables.serving(run) for run in runs],
        colour=colour,
        drafts=drafts,
        configs=[run.paths.config.read_text(encoding="utf-8") for run in runs],
        version=specdist.__version__,
        now=time.strftime("%Y-%m-%d %H:%M %Z"),
    )


def _json(value: Any) -> str:
    """For a script of the page: no tag can end it, and what is no number is null."""
    return msgspec.json.encode(value, enc_hook=float).decode().replace("<", "\\u003c")
