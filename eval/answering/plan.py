"""Which model answers which questions: the inputs of an evaluation, checked before anything heavy is loaded."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.answering.answers import AnswerLog
from eval.answering.costs import CostLog
from eval.answering.models import SavedModel, check_model, with_seeds
from eval.answering.workers import Job
from eval.benchmark import Benchmark
from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.reading.images import PLACEHOLDER
from eval.reading.tables import Stamps, sha256, stamps
from eval.sample import Sample, Score
from eval.versions import versions
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.paths import embedded_benchmarks, newest_model, shown
from llava_skip_base.texts import shortened

if TYPE_CHECKING:
    from eval.answering.generate import Numerics

ALL = "all"
BLIND = "-blind"
BUILD = "build it with 'llava-skip data'"


@dataclass
class Run:
    """One model on one benchmark, its inputs checked.

    Attributes:
        benchmark: what to ask and how to score.
        model: who answers.
        data: the benchmark file.
        images: folder of image files, or None for the one next to the data.
        samples: the questions.
        output: folder of all results.
        stamps: of the benchmark file before it was read.
        batch_size: questions answered at once.
        max_new_tokens: limit of an answer's length.
        blind: whether the questions are asked without their images.
    """

    benchmark: Benchmark
    model: SavedModel
    data: Path
    images: Path | None
    samples: list[Sample]
    stamps: Stamps
    output: Path
    batch_size: int
    max_new_tokens: int
    blind: bool = False

    @property
    def name(self) -> str:
        """The model's name in results."""
        return f"{self.model.name}{BLIND if self.blind else ''}"

    @property
    def folder(self) -> Path:
        """Where the answers and the result go."""
        return self.output / self.benchmark.name / self.name

    @cached_property
    def prompts(self) -> list[str]:
        """What is asked, in the order of the samples."""
        return self.benchmark.prompts(self.samples)

    def check_prompts(self) -> None:
        """Refuse questions whose text has placeholders for more or fewer images than they have."""
        pairs = zip(self.samples, self.prompts, strict=True)
        if unlike := [s.id for s, prompt in pairs if prompt.count(PLACEHOLDER) not in (0, len(s.images))]:
            raise UserError(
                f"{self.data}: {first_few(unlike)} of {len(self.samples)} questions hold another number of "
                f"{PLACEHOLDER} than they have images; remove it, or put it once for each."
            )

    @cached_property
    def data_sha256(self) -> str:
        """Hash of the benchmark file.

        Raises:
            UserError: it has changed since its questions were read.
        """
        found = sha256([self.data]) if stamps(self.data) else ""
        if stamps(self.data) != self.stamps:
            raise UserError(f"{self.data}: has been replaced or changed since its questions were read; start again.")
        return found

    def identity(self, numerics: "Numerics") -> dict[str, Any]:
        """What the answers depend on; an interrupted run continues only if all of it is unchanged."""
        return {
            "benchmark": self.benchmark.name,
            "model": self.name,
            "model_sha256": self.model.sha256,
            **({} if self.model.reduction is None else {"reduction": str(self.model.reduction)}),
            "data_sha256": self.data_sha256,
            "protocol": self.benchmark.protocol(self.samples),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,  # the neighbours in a batch decide the rounding
            **asdict(numerics),
        }

    def jobs(self, number: int, log: AnswerLog) -> list[Job]:
        """The batches with questions that the log has no answer to yet, the longest first.

        All questions are batched, not only the open ones: after an interruption, and with any number of processes,
        each question is then in the same batch, and so has the same rounding.

        Args:
            number: of this run, for the jobs.
            log: the answers so far.
        """
        pairs = zip(self.samples, self.prompts, strict=True)
        asked = sorted(pairs, key=lambda pair: (len(pair[0].images), len(pair[1])), reverse=True)
        jobs = []
        for start in range(0, len(asked), self.batch_size):
            samples, prompts = zip(*asked[start : start + self.batch_size], strict=True)
            if any(sample.id not in log.answers for sample in samples):
                ids, images = tuple(s.id for s in samples), tuple(() if self.blind else s.images for s in samples)
                jobs.append(Job(number, ids, prompts, images, self.model, self.max_new_tokens))
        return jobs

    def new_answers(self, job: Job, texts: Sequence[str], log: AnswerLog) -> list[dict[str, Any]]:
        """The answers of a job, as lines of the log, without those that the log has already."""
        return [
            {**self._fields[id_], "index": id_, "prompt": prompt, "prediction": text}
            for id_, prompt, text in zip(job.ids, job.prompts, texts, strict=True)
            if id_ not in log.answers
        ]

    def result(self, score: Score, numerics: "Numerics", costs: CostLog) -> dict[str, Any]:
        """Everything that a reader of the score needs; only `costs`, which was measured, changes from run to run."""
        values = {name: value for name, value in asdict(score).items() if name != "per_sample"}
        images = None if self.images is None else str(self.images)
        limits = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        return {
            "benchmark": self.benchmark.name,
            **values,
            "full_score": self.benchmark.full_score,
            "protocol": self.benchmark.protocol(self.samples),
            "model": {**self.model.describe(), "name": self.name},
            "data": {"path": str(self.data), "images": images, "sha256": self.data_sha256},
            "generation": {**limits, "greedy": True, "blind": self.blind, **asdict(numerics)},
            "versions": versions("torch", "transformers", "llava_skip"),
            "image_tokens": self.model.image_tokens(),
            "costs": costs.summary(self.batch_size),
        }

    @cached_property
    def _fields(self) -> dict[int | str, dict[str, Any]]:
        return {sample.id: sample.fields for sample in self.samples}


def assign(option: str, given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The values by benchmark of an option that is a value, or NAME=VALUE for each of several benchmarks.

    Args:
        option: the option's name, for messages.
        given: what was given for it.
        names: the benchmarks.

    Raises:
        UserError: it is unclear which benchmark a value belongs to.
    """
    values: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in BENCHMARKS:
            if len(names) != 1:
                raise UserError(
                    f"{option} {shortened(text)}: with {len(names)} benchmarks say whose: "
                    f"{option} {names[0]}={shortened(text)}."
                )
            name, value = names[0], text
        if name not in names:
            raise UserError(f"{option} {shortened(text)}: {name} is not evaluated here; add it to --benchmarks.")
        if name in values:
            raise UserError(f"{option} is given twice for {name}.")
        values[name] = value
    return values


def chosen_benchmarks(text: str, data: Sequence[str]) -> list[str]:
    """The benchmarks of `--benchmarks`; "all" means those that `--data` names, else those of the embedded set.

    Raises:
        UserError: an unknown or repeated name, or none.
    """
    if text == ALL:
        named = [name for name in BENCHMARKS if any(value.startswith(f"{name}=") for value in data)]
        if data and not named:
            raise UserError(
                f"--data {data[0]}: say whose it is, --benchmarks NAME with one of {', '.join(BENCHMARKS)}."
            )
        folder = embedded_benchmarks()
        names = named or [name for name, kind in BENCHMARKS.items() if (folder / kind.embedded).exists()]
        if not names:
            raise UserError(f"{shown(folder)} does not exist; {BUILD}.")
        return names
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [get_benchmark(name).name for name in names]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--benchmarks is '{text}'; expected different names of {', '.join(BENCHMARKS)}, or {ALL}.")
    return names


def embedded_file(benchmark: Benchmark) -> Path:
    """The benchmark's file in the embedded data set.

    Raises:
        UserError: the data set has not been built.
    """
    path = embedded_benchmarks() / benchmark.embedded
    if not path.exists():
        raise UserError(f"no --data given, and {shown(path)} does not exist; {BUILD}.")
    return Path(shown(path))


def checked_models(folders: Sequence[Path], reductions: Sequence[str] = (), needed: bool = True) -> list[SavedModel]:
    """Check the models, by default the newest one, each with each reduction; none if none is given nor needed.

    A folder of seeds stands for the model of each.

    Raises:
        UserError: one is not whole, or a reduction is unknown, given twice, or does not fit.
    """
    if not folders and not needed:
        return []
    models = [check_model(own) for folder in folders or [newest_model()] for own in with_seeds(folder)]
    if not reductions:
        return models
    from llava_skip.reduction import ReductionConfig  # slow to import

    parsed = [ReductionConfig.parse(text) for text in reductions]
    if doubled := sorted({str(one) for one in parsed if parsed.count(one) > 1}):
        raise UserError(f"--reduction names {first_few(doubled)} twice: give each method once.")
    return [model.reduced(reduction) for model in models for reduction in parsed]


def check_names(models: Sequence[SavedModel]) -> None:
    """Refuse models of one name, because results are filed under it."""
    names = [model.name for model in models]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(
            f"several models are called {first_few(doubled)}, so their results would share a folder; rename one, or "
            "evaluate them one after the other, each with its own --output."
        )


def _load(
    benchmark: Benchmark, files: Mapping[str, Path], folders: Mapping[str, Path], limit: int | None
) -> tuple[Benchmark, Path, Path | None, Any, Any]:
    """A benchmark, its file, its image folder, its questions, and the stamps of the file before it was read."""
    path, folder = files.get(benchmark.name) or embedded_file(benchmark), folders.get(benchmark.name)
    before, samples = stamps(path), benchmark.load(path, folder)
    return benchmark, path, folder, benchmark.limit(samples, limit) if limit else samples, before


def plan_runs(
    names: Sequence[str],
    find_models: Callable[[], Sequence[SavedModel]],
    data: Sequence[str],
    images: Sequence[str],
    output: Path,
    batch_size: int,
    max_new_tokens: int | None,
    limit: int | None,
    blind: bool,
    rules: Sequence[str],
    protocols: Sequence[str],
) -> list[Run]:
    """Check all inputs, the cheap ones first, before a model is loaded.

    Args:
        names: the benchmarks.
        find_models: gives the checked models, when all that is quicker to check is right; their names must differ.
        data: benchmark files, or none for the embedded ones.
        images: folders of image files.
        output: results go to `OUTPUT/BENCHMARK/MODEL`.
        batch_size: questions answered at once.
        max_new_tokens: limit of an answer's length, or None for the protocol's.
        limit: number of questions of each benchmark, or None for all.
        blind: ask without images.
        rules: how to score, or none for the official rules.
        protocols: how to ask, or none for the default protocols.

    Returns:
        A run for each model and benchmark, the benchmarks of one model together.

    Raises:
        UserError: on the first thing that is wrong.
    """
    for name, value in {"--batch-size": batch_size, "--max-new-tokens": max_new_tokens, "--limit": limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more.")
    files = {name: Path(path).expanduser() for name, path in assign("--data", data, names).items()}
    image_folders = {name: Path(path).expanduser() for name, path in assign("--images", images, names).items()}
    rule, protocol = assign("--rule", rules, names), assign("--protocol", protocols, names)
    benchmarks = [get_benchmark(name, rule.get(name), protocol.get(name)) for name in names]
    for given in image_folders.values():
        if not os.path.isdir(given):
            raise UserError(f"{shortened(given)}: no such image folder; check --images.")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"{output}: is a file; give a folder for the results with --output.")
    models = find_models()
    check_names(models)
    loaded = [_load(benchmark, files, image_folders, limit) for benchmark in benchmarks]
    runs = [
        Run(own, model, path, folder, samples, before, output, batch_size, max_new_tokens or own.max_new_tokens, blind)
        for model in models
        for own, path, folder, samples, before in loaded
    ]
    for run in runs:
        run.check_prompts()
    return runs
