"""Read everything that training would read, and list what is wrong with it.

    python -m train.validate_data mixture.yaml --template v1 --tokenizer lmsys/vicuna-7b-v1.5 --preset sv-llava-256

Model and data arguments are those of train.train. Exit code 0: the set can be trained on; 1: there are errors; 2: a
mistake in the arguments. Training with the same arguments uses the findings and starts at once.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_skip_base.console import make_table, one_message, output_console, print_text
from llava_skip_base.exits import FAULTY_RECORDS
from llava_skip_base.files import write_json
from train.arguments import DataArguments, ModelArguments
from train.command_line import read_command_line
from train.data import load_records
from train.data.checks import CONVERTED, ERRORS, WARNINGS, Examined, Finding, FullCheck
from train.data.usable import examine, save_findings
from train.recipe.model import prepare

SHOWN_COLUMNS = 20
"""Columns that nothing reads of which the table has the names; the report has all."""


@dataclass
class ValidationArguments:
    """Where the findings go."""

    report: str = field(default="validation.json", metadata={"help": "JSON of the counts and of every finding."})


@dataclass
class Findings:
    """What was found in a set, added up record by record.

    Attributes:
        records: examined.
        images: of records without a structural fault.
        samples: that could be measured.
        tokens: of those samples, with the image tokens.
        supervised: tokens with a label.
        longest: sample, in tokens.
        lost: tokens that the limit would cut.
        lost_supervised: of them, with a label.
        counts: records of each kind.
        unread: columns that nothing reads, with the number of records that have them.
        offenders: errors and warnings.
    """

    records: int = 0
    images: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    lost: int = 0
    lost_supervised: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    offenders: list[Finding] = field(default_factory=list)

    def add(self, examined: Examined) -> None:
        """Count a record."""
        self.records += 1
        self.images += examined.images
        self.counts.update({finding.kind for finding in examined.findings})
        self.unread.update(examined.unread)
        self.offenders += [finding for finding in examined.findings if finding.kind not in CONVERTED]
        if (measured := examined.measure) is not None:
            self.samples += 1
            self.tokens += measured.length
            self.supervised += measured.supervised
            self.longest = max(self.longest, measured.length)
            self.lost += measured.lost
            self.lost_supervised += measured.lost_supervised

    @property
    def errors(self) -> list[Finding]:
        """Those with which a record cannot be trained on."""
        return [finding for finding in self.offenders if finding.is_error]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data under the keys of the file."""
        keys = {"images": "pictures", "tokens": "rows", "supervised": "learnt", "lost_supervised": "lost_learnt"}
        totals = {keys.get(name, name): value for name, value in vars(self).items() if isinstance(value, int)}
        offenders = [{**finding._asdict(), "error": finding.is_error} for finding in self.offenders]
        unread = dict(self.unread.most_common())
        return {"totals": totals, "counts": dict(self.counts), "unread_columns": unread, "offenders": offenders}


def validate(model: ModelArguments, data: DataArguments) -> Findings:
    """Examine every record of a set; its errors are kept for training.

    Raises:
        UserError: see the message.
    """
    records = load_records(data.data, data.images)
    _, processor = prepare(model)
    check, findings = FullCheck(records, processor, data.max_length), Findings()
    for examined in examine(check, data.data_processes, "validating"):
        findings.add(examined)
    save_findings(check, findings.errors, findings.unread)
    return findings


def show(findings: Findings, max_length: int, report: str) -> None:
    """Two tables: what the set contains, and what is wrong or unusual; then what to do next."""
    console = output_console()
    mean = findings.tokens / max(findings.samples, 1)
    totals = (
        ("records", f"{findings.records:,}"),
        ("images", f"{findings.images:,}"),
        ("tokens a sample, mean and longest", f"{mean:,.0f}, {findings.longest:,}"),
        ("share of tokens supervised", f"{findings.supervised / max(findings.tokens, 1):.1%}"),
        (f"tokens that --max_length {max_length} cuts", f"{findings.lost:,}, {findings.lost_supervised:,} supervised"),
    )
    console.print(make_table("what was read", ("", ""), totals))
    rows = []
    for label, kinds in (("error", ERRORS), ("warning", WARNINGS), ("converted", CONVERTED)):
        for kind in filter(findings.counts.__getitem__, kinds):
            example = next((f"{f.record}: {f.text}" for f in findings.offenders if f.kind == kind), "")
            rows.append((f"{findings.counts[kind]:,}", label, kind, example))
    if rows:
        console.print(make_table(f"findings -> {report}", ("records", "", "kind", "for example"), rows))
    if findings.unread:
        columns = [(f"{count:,}", name) for name, count in findings.unread.most_common(SHOWN_COLUMNS)]
        title = f"columns that nothing reads: {len(findings.unread):,}"
        console.print(make_table(title, ("records", "column"), columns))
    if faulty := len({finding.row for finding in findings.errors}):
        print_text(f"{faulty:,} records cannot be trained on: correct them, or train with --drop_faulty true.")
    else:
        print_text("The set can be trained on: run llava-skip train with the same arguments.")


def main() -> None:
    """Validate, show, write the findings, and exit with the code."""
    line = sys.argv[1:]
    if line and not line[0].startswith("-"):
        line = ["--data", *line]
    with one_message():
        model, data, own = read_command_line((ModelArguments, DataArguments, ValidationArguments), line)
        findings = validate(model, data)
    write_json(Path(own.report).expanduser(), findings.as_dict())
    show(findings, data.max_length, own.report)
    raise SystemExit(FAULTY_RECORDS if findings.errors else 0)


if __name__ == "__main__":
    main()
