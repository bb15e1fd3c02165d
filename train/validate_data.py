"""Read everything that training would read, and say what is wrong with it.

    python -m train.validate_data mixture.yaml --template v1 --tokenizer lmsys/vicuna-7b-v1.5 --preset sv-llava-256

Model and data arguments are those of train.train. Exit code 0: nothing stands against training; 1: there are errors;
2: a mistake in the arguments. Training with the same arguments finds the report and starts at once.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.arguments import DataArguments, ModelArguments
from train.command_line import read_command_line
from train.data import load_records
from train.data.checks import CONVERTED, ERRORS, WARNINGS, Examined, Finding, FullCheck
from train.data.usable import examine, save_errors
from train.recipe.model import prepare
from llava_skip.files import write_json

FAULTY, USER_ERROR = 1, 2


@dataclass
class ValidationArguments:
    """Where the findings go."""

    report: str = field(default="validation.json", metadata={"help": "JSON of the counts and of every offender."})


@dataclass
class Findings:
    """What was found in a set, added up record by record.

    Attributes:
        records: examined.
        pictures: of records without a structural fault.
        samples: that could be measured.
        rows: of those samples, pictures included.
        learnt: rows with a label.
        longest: sample, in rows.
        lost: rows that the limit would cut.
        lost_learnt: of them, with a label.
        counts: records of each kind.
        offenders: errors and warnings.
    """

    records: int = 0
    pictures: int = 0
    samples: int = 0
    rows: int = 0
    learnt: int = 0
    longest: int = 0
    lost: int = 0
    lost_learnt: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    offenders: list[Finding] = field(default_factory=list)

    def add(self, examined: Examined) -> None:
        """Count a record."""
        self.records += 1
        self.pictures += examined.pictures
        self.counts.update({finding.kind for finding in examined.findings})
        self.offenders += [finding for finding in examined.findings if finding.kind not in CONVERTED]
        if (measured := examined.measure) is not None:
            self.samples += 1
            self.rows += measured.rows
            self.learnt += measured.learnt
            self.longest = max(self.longest, measured.rows)
            self.lost += measured.lost
            self.lost_learnt += measured.lost_learnt

    @property
    def errors(self) -> list[Finding]:
        """Those with which a record cannot be trained on."""
        return [finding for finding in self.offenders if finding.is_error]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        totals = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        offenders = [{**finding._asdict(), "error": finding.is_error} for finding in self.offenders]
        return {"totals": totals, "counts": dict(self.counts), "offenders": offenders}


def validate(model: ModelArguments, data: DataArguments) -> Findings:
    """Examine every record of a set; its errors are kept for training.

    Raises:
        ValueError: see the message.
        FileNotFoundError: see the message.
    """
    records = load_records(data.data, data.images)
    _, processor = prepare(model)
    check, findings = FullCheck(records, processor, data.max_length), Findings()
    for examined in examine(check, data.data_processes, "validating"):
        findings.add(examined)
    save_errors(check, findings.errors)
    return findings


def show(findings: Findings, max_length: int, report: str) -> None:
    """Two tables: what the set holds, and what is wrong or unusual."""
    console = Console()
    totals = Table(title="what was read", show_header=False)
    mean = findings.rows / max(findings.samples, 1)
    for name, text in (
        ("records", f"{findings.records:,}"),
        ("pictures", f"{findings.pictures:,}"),
        ("rows a sample, mean and longest", f"{mean:,.0f}, {findings.longest:,}"),
        ("share of rows learnt", f"{findings.learnt / max(findings.rows, 1):.1%}"),
        (f"rows that --max_length {max_length} cuts", f"{findings.lost:,}, of them {findings.lost_learnt:,} learnt"),
    ):
        totals.add_row(name, text)
    console.print(totals)
    if not findings.counts:
        console.print("Nothing is wrong with it.")
        return
    table = Table("records", "", "kind", "for example", title=f"findings -> {report}")
    for label, kinds in (("error", ERRORS), ("warning", WARNINGS), ("converted", CONVERTED)):
        for kind in kinds:
            if count := findings.counts[kind]:
                example = next((f"{f.record}: {f.text}" for f in findings.offenders if f.kind == kind), "")
                table.add_row(f"{count:,}", label, kind, example)
    console.print(table)


def main() -> None:
    """Validate, show, write the report, and leave with the exit code."""
    line = sys.argv[1:]
    if line and not line[0].startswith("-"):
        line = ["--data", *line]
    try:
        model, data, own = read_command_line((ModelArguments, DataArguments, ValidationArguments), line)
        findings = validate(model, data)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(USER_ERROR) from None
    write_json(Path(own.report), findings.as_dict())
    show(findings, data.max_length, own.report)
    raise SystemExit(FAULTY if findings.errors else 0)


if __name__ == "__main__":
    main()
