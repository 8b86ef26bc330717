"""`compt doctor`: whether machines are fit for a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compt.cli.options import AsJson, print_json
from compt.text import terminal

if TYPE_CHECKING:
    from compt.dist.doctor.findings import Finding

_SHOWN = {"ok": "green", "note": "yellow", "wrong": "bold red", "not checked": "dim"}


def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUNS", help="folder that will hold the runs")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check this machine, or every node under srun or torchrun.

    It checks that all nodes have the same driver, CUDA and packages; GPUs and their free memory; limits; that all nodes
    see the run folder, with working renames and locks; and collectives over gloo and NCCL.
    Exits with code 1 if something is wrong.
    """
    from compt.dist import collectives as dist
    from compt.dist.doctor.together import examine

    findings = examine(run)
    fit = all(finding.state != "wrong" for finding in findings)
    found = {"ok": fit, "findings": [asdict(finding) for finding in findings]}
    # All ranks wait for rank 0: a launcher stops them when the first one exits.
    dist.on_main(lambda: print_json(found) if as_json else _show(findings))
    if not fit:
        # Without leaving the group, which would wait for a collective that hangs.
        raise typer.Exit(1)
    dist.shutdown()


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
