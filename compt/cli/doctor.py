"""`compt doctor`: whether the nodes are fit for a training. Imports no torch until it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compt.text import terminal

if TYPE_CHECKING:
    from compt.dist.doctor.findings import Finding

_SHOWN = {"ok": "green", "note": "yellow", "wrong": "bold red", "not checked": "dim"}


def doctor(
    run: Annotated[Path, typer.Argument(help="the folder that runs are going to lie in")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check this machine, or every node under srun or torchrun. Exit code 1 where something is wrong.

    Driver, CUDA, NCCL and GPUs; the same versions everywhere; a run folder that all nodes see, with renames and locks
    that work; clocks, network and limits.
    """
    from compt.dist import collectives as dist
    from compt.dist.doctor.findings import examine, is_fit, to_json

    try:
        findings = examine(run)
        text = json.dumps(to_json(findings), indent=2)
        # The others wait: a launcher stops all when one of them ends.
        dist.on_main(lambda: typer.echo(text) if as_json else _show(findings))
    finally:
        dist.shutdown()
    if not is_fit(findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("check", "", "found"):
        table.add_column(name, no_wrap=name != "found")
    for finding in findings:
        found = Text(finding.found)
        if finding.remedy and finding.state in ("note", "wrong"):
            found.append(f"\n{finding.remedy}", style="italic")
        table.add_row(Text(finding.check), Text(finding.state, style=_SHOWN[finding.state]), found)
    terminal().print(table)
