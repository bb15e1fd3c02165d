"""Public files that recipes and benchmarks name: where they are, and how large, as far as that is known."""

from __future__ import annotations

from dataclasses import dataclass

from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A public training set.

    Attributes:
        samples: records.
        image_share: of them, with an image.
        text_tokens: assumed mean of a sample; nobody has measured it here.
        supervised_tokens: assumed, of these.
        files: (file, where it is, size in words).
        public: whether it is.
    """

    samples: int
    image_share: float
    text_tokens: float
    supervised_tokens: float
    files: tuple[tuple[str, str, str], ...] = ()
    public: bool = True


_IMAGES = (
    ("`coco/train2017`", "COCO, cocodataset.org", "118,287 images, 18 GB"),
    ("`gqa/images`", "GQA, cs.stanford.edu/people/dorarad/gqa", "148,854 images, about 20 GB"),
    ("`ocr_vqa/images`", "OCR-VQA, ocr-vqa.github.io", "207,572 images, size unknown"),
    ("`textvqa/train_images`", "TextVQA, textvqa.org", "25,119 images, size unknown"),
    ("`vg/VG_100K`, `vg/VG_100K_2`", "Visual Genome", "64,346 and 43,903 images, about 14 GB together"),
)

DATA_SETS: dict[str, DataSet] = {
    "llava_v1_5_mix665k.json": DataSet(
        665_298, 624_610 / 665_298, 200, 100,
        (("`llava_v1_5_mix665k.json`", "liuhaotian/LLaVA-Instruct-150K on Hugging Face",
          "665,298 records, size unknown"), *_IMAGES),
    ),
    "blip_laion_cc_sbu_558k.json": DataSet(
        558_128, 1.0, 25, 20,
        (("`blip_laion_cc_sbu_558k.json`", "liuhaotian/LLaVA-Pretrain on Hugging Face", "558,128 records, 181 MB"),
         ("`images.zip`", "liuhaotian/LLaVA-Pretrain on Hugging Face", "558,128 images, size unknown")),
    ),
    "sv-1m.yaml": DataSet(1_000_000, 1.0, 200, 100, public=False),
    "sv-9m.yaml": DataSet(9_000_000, 1.0, 200, 100, public=False),
}  # fmt: skip
"""By the file that a recipe names. Counts of images: haotian-liu/LLaVA, issue 702, and the data sets' own pages."""

BENCHMARKS: dict[str, tuple[str, str]] = {
    "mme": ("MME", "MME_Benchmark_release_version"),
    "textvqa": ("TextVQA", "textvqa"),
    "mmbench": ("MMB", "mmbench_dev_20230712.tsv"),
    "mmvet": ("MMVet", "mm-vet"),
    "mmmu": ("MMMU", "MMMU_DEV_VAL.tsv"),
    "mathvista": ("MathV", "mathvista/testmini.json"),
    "ocrbench": ("OCRB", "OCRBench.json"),
    "mmstar": ("MMStar", "mmstar.tsv"),
    "gqa": ("GQA", "gqa/testdev_balanced_questions.json"),
}
"""Benchmark -> its name in the paper's tables, and its public file (docs/benchmarks has a page for each)."""

NEEDS_JUDGE = ("mmvet",)
"""Benchmarks that no rule grades; of the others some use a judge where no rule reads an answer."""

NO_METHOD = (
    (1, "MQT-LLaVA", (1487, 53.6, 69, 28.2, 37.8, 16.8, 28.1, 36.5), 7.5, "44%",
     "another projector (256 queries, cut to a random number in training), trained in both stages: it is no reduction "
     "of a dense model's tokens, and is not built"),
    (1, "LLaVA-TokenPacker", (1538, 56.2, 72.3, 32.1, 39.0, 19.3, 29.8, 35.0), 8.8, "24%",
     "another projector (queries of a smaller map attend to their regions), trained in both stages, and not built"),
)  # fmt: skip
"""Rows of the paper's tables that no recipe is for: table, row, scores, hours, FLOPs, and why."""


def data_set_of(data: str | None) -> DataSet | None:
    """The public set that a path names by its file; None if it is another one."""
    return None if data is None else DATA_SETS.get(data.rpartition("/")[2])


def known_samples(data: str) -> DataSet:
    """The public set that a path names.

    Raises:
        UserError: it is none of them, and not here.
    """
    if (found := data_set_of(data)) is None:
        raise UserError(
            f"--data {data} is not here to be measured, and none of {', '.join(DATA_SETS)}: give its number of "
            "--samples instead."
        )
    return found
