"""The page of the paper's tables: for each row a recipe, commands, expected scores, and what it costs by formula."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llava_skip.gpus import get_gpu
from llava_skip.memory import Zero
from llava_skip.reduction import reduction_names
from train.planning.estimate import Machine, Training, training_cost
from train.planning.models import config_for, size_of
from train.planning.published import BENCHMARKS, DATA_SETS, NEEDS_JUDGE, NO_METHOD, data_set_of, known_samples
from train.planning.shape import assumed
from train.recipe.parts import PART_PREFIXES
from train.recipe.recipes import checkpointing_of, paper_row, read_recipe, recipe_names

UTILISATION = 0.3
"""Share of the peak at which the page's hours are estimated, recomputed products included."""
MACHINE = Machine("A100", get_gpu("A100"), 8, UTILISATION)
"""That of the paper: 8 A100; taken to be those of 80 GB."""
TITLES = {
    1: "Table 1: LLaMA3-8B",
    2: "Table 2: Vicuna-1.5-7B",
    3: "Table 3: more data, LLaMA3-8B",
}
STAGE_1 = {1: ("table1-pretrain", "table1-pretrain-cos"), 2: ("table2-pretrain",), 3: ("table1-pretrain-cos",)}
"""Recipes of the stage 1 that a table's rows start from."""

HEAD = """# The paper's tables as commands

Made by `llava-skip reproduce` from the recipes in `train/recipes/`; a test fails when it is stale. Each row of tables 1
to 3 of the paper (arXiv 2503.21817) is a recipe, whose first lines say what it is, and an evaluation command. Scores,
hours and FLOPs of the column "paper" are the paper's. **Nobody has run these recipes at this size here**: what is
checked is that each resolves, and what it would cost.

Hours and memory are estimated by formula ([plan.md](plan.md)) for {gpus} A100 of 80 GB, with every product at
{utilisation:.0%} of the peak ({peak} TFLOPs), those that activation checkpointing repeats included (HFU). They hold for
the assumed lengths in the table of the data. GiB are those of one GPU for a batch of mean and of longest samples. Steps
and samples a step are of the whole run. Settings of the LLaMA3-8B rows follow the scripts of the paper's code: 64
samples a step, learning rate 1e-5 (chain of sight: 2e-5, tower trained), ZeRO-3. Activations are recomputed where the
longest batch does not fit otherwise; the paper's scripts always do it. The paper does not say which of its scripts made
which row.
"""

MIXTURE = """
The images are in one folder, `--images playground/data`, as LLaVA lays them out. SV-1M and SV-9M of the paper are not
public; `sv-1m.yaml` is a mixture ([data.md](data.md)) that you write of what you have:

```yaml
sources:
  llava: {path: llava_v1_5_mix665k.json, images: playground/data}
  more: {path: more.json, images: more, weight: 1}
```

Assumed of a sample, since nobody has measured these sets here (`llava-skip plan --data FILE` does):

"""

TEXT = 200
"""Tokens of text that the page's hours assume of LLaVA's 665k mix."""

UNEQUAL = """
No single share of the peak predicts all of them. The implied shares go from {least_share:.0%} (`{least}`) to
{most_share:.0%} (`{most}`): the paper's skipping models save less time than FLOPs, as if each step had a part that does
not shrink (data, communication of ZeRO-3, padding), and its LLaVA-HD takes less time than 2880 tokens for every image
would. A mean of {text} tokens of text is assumed; with 300 the implied shares are nearer to each other, in the same
order. `llava-skip plan --utilisation` and `--step_seconds` take what you measure on your machine.
"""


@dataclass(frozen=True)
class Row:
    """A recipe with what it would cost."""

    name: str
    recipe: dict[str, Any]
    paper: dict[str, Any]
    cost: dict[str, Any] | None


@cache
def cost_of(name: str) -> dict[str, Any] | None:
    """What a recipe costs on the paper's machine; None if its rival method is not installed."""
    recipe = read_recipe(name)
    reduction = recipe.get("reduction")
    if reduction is not None and reduction.partition(":")[0] not in reduction_names():
        return None
    data = known_samples(recipe["data"])
    shape = assumed(data.samples, data.text_tokens, data.supervised_tokens, data.image_share)
    config = config_for(None, size_of(recipe["model"], None), recipe["preset"], reduction)
    step = recipe["samples_per_step"]
    training = Training(
        trained=tuple(recipe.get("train_parts") or [part for part in PART_PREFIXES if part != "vision_tower"]),
        batch=min(recipe["per_device_train_batch_size"], step // MACHINE.gpus),
        samples_per_step=step,
        epochs=recipe["num_train_epochs"],
        max_length=recipe.get("max_length", 2048),
        checkpointing=checkpointing_of(recipe["activation_checkpointing"]),
        zero=Zero(int(recipe["deepspeed"].removeprefix("zero")[0])),
    )
    return training_cost(config, shape, training, MACHINE)


@cache
def rows() -> tuple[Row, ...]:
    """All rows, in the order of the tables."""
    found = [(name, paper_row(name)) for name in recipe_names()]
    made = [Row(name, read_recipe(name), paper, cost_of(name)) for name, paper in found if paper is not None]
    return tuple(sorted(made, key=lambda row: (row.paper["table"], _place(row))))


def _place(row: Row) -> tuple[int, str]:
    """Dense models first, then rivals, then skipping, of each front end."""
    kind = row.recipe["preset"]
    group = next(n for n, word in enumerate(("hd", "cos", "")) if word in kind) if row.paper["table"] == 1 else 2
    return {2: 0, 0: 1, 1: 2}[group] * 10 + 2 * kind.startswith("sv-") + ("reduction" in row.recipe), row.name


def table(headings: list[str], body: list[list[str]]) -> str:
    """A table in markdown."""
    lines = [headings, ["---"] * len(headings), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def data_section() -> str:
    """The data files, and the assumed lengths."""
    text = "\n## Data\n\n"
    body = []
    for name, found in DATA_SETS.items():
        body += [[f"`{name}`", *entry] for entry in found.files]
        if not found.public:
            body.append([f"`{name}`", f"`{name}`", "not public as far as known", f"{found.samples:,} by its name"])
    text += table(["data of a recipe", "file", "where", "size"], body)
    text += MIXTURE
    lengths = [
        [f"`{name}`", f"{found.samples:,}", f"{found.image_share:.1%}", f"{found.text_tokens:g}",
         f"{found.supervised_tokens:g}"]
        for name, found in DATA_SETS.items()
    ]  # fmt: skip
    return text + table(["data", "samples", "with an image", "tokens of text", "of them supervised"], lengths)


def scores(paper: dict[str, Any]) -> list[str]:
    """The paper's scores, in the order of the benchmarks."""
    return [f"{paper['scores'][name]:g}" if name in paper["scores"] else "-" for name in benchmarks(paper["table"])]


def benchmarks(number: int) -> list[str]:
    """The benchmarks of a table."""
    named = {name for row in rows() if row.paper["table"] == number for name in row.paper["scores"]}
    return [name for name in BENCHMARKS if name in named]


def costs(cost: dict[str, Any] | None) -> list[str]:
    """Steps, samples, estimated hours and memory of a recipe."""
    if cost is None:
        return ["-"] * 4
    memory = cost["memory"]
    sizes = f"{memory['mean_batch_peak']:.0f}, {memory['peak']:.0f}"
    return [f"{cost['steps']:,}", str(cost["samples_per_step"]), f"{cost['hours']:.1f}", sizes]


def table_section(number: int) -> str:
    """One table of the paper: its rows, and the commands."""
    chosen = [row for row in rows() if row.paper["table"] == number]
    names = benchmarks(number)
    text = f"\n## {TITLES[number]}\n\n"
    headings = ["recipe", "row of the paper", *(BENCHMARKS[name][0] for name in names)]
    body = [[f"`{row.name}`", row.paper["row"], *scores(row.paper)] for row in chosen]
    body += [["-", title, *(f"{value:g}" for value in given)] for at, title, given, *_ in NO_METHOD if at == number]
    text += "Expected scores (the paper's):\n\n" + table(headings, body) + "\nCosts:\n\n"
    headings = ["recipe", "model", "image", "steps", "samples a step", "hours, estimated", "GiB: mean, longest"]
    headings += ["hours, paper", "FLOPs, paper"]
    body = [
        [f"`{name}`", read_recipe(name)["model"], "stage 1", *costs(cost_of(name)), "-", "-"]
        for name in STAGE_1[number]
    ]
    for row in chosen:
        tokens = row.recipe.get("reduction") or row.recipe["preset"]
        cells = [f"`{row.name}`", row.recipe["model"].removeprefix("{checkpoints}/"), f"`{tokens}`", *costs(row.cost)]
        body.append([*cells, str(row.paper.get("hours", "-")), str(row.paper.get("flops", "-"))])
    text += table(headings, body)
    for at, title, _, hours, flops, why in NO_METHOD:
        if at == number:
            text += f"\n{title} ({hours} hours, {flops} of the FLOPs in the paper): no recipe. It is {why}.\n"
    return text + commands(number, chosen)


def commands(number: int, chosen: list[Row]) -> str:
    """The commands of a table's rows."""
    names = benchmarks(number)
    text = "\n```bash\n# stage 1\n"
    for name in STAGE_1[number]:
        text += f"llava-skip train --recipe {name}\n"
    text += f'DATA="--benchmarks {",".join(names)} \\\n'
    text += "".join(f"    --data {name}={BENCHMARKS[name][1]} \\\n" for name in names)[:-3] + '"\n'
    for row in chosen:
        text += f"\n# {row.paper['row']}\nllava-skip train --recipe {row.name}\n"
        text += f"llava-skip eval --model checkpoints/{row.name} $DATA\n"
        if "reduction" in row.recipe:
            dense = row.recipe["model"]
            dense = next(r.name for r in chosen if "reduction" not in r.recipe and r.recipe["model"] == dense)
            text += "# the same without training, on the dense row's model\n"
            text += f"llava-skip eval --model checkpoints/{dense} --reduction {row.recipe['reduction']} $DATA\n"
    text += "```\n"
    if set(names) & set(NEEDS_JUDGE):
        text += "\nMM-Vet needs a judge, MMBench and MathVista use one: [benchmarks](benchmarks/README.md#judges).\n"
    return text


def hours_section() -> str:
    """What the paper's hours imply, and what one share of the peak predicts of them."""
    timed = [row for row in rows() if "hours" in row.paper and row.cost is not None and data_set_of(row.recipe["data"])]
    timed = [row for row in timed if "reduction" not in row.recipe and DATA_SETS[row.recipe["data"]].public]
    body, implied = [], {}
    dense = next(row for row in timed if row.name == "table1-llava")
    for row in timed:
        assert row.cost is not None  # chosen above
        paper, estimate = row.paper["hours"], row.cost["hours"]
        share = UTILISATION * estimate / paper
        implied[row.name] = share
        scaled = estimate * UTILISATION / (UTILISATION * dense.cost["hours"] / dense.paper["hours"])  # type: ignore[index]
        flops = row.cost["flops"] / dense.cost["flops"]  # type: ignore[index]
        body.append([f"`{row.name}`", f"{paper:g}", f"{estimate:.1f}", f"{share:.0%}", f"{scaled:.1f}",
                     f"{scaled / paper:.2f}", f"{flops:.0%}", f"{paper / dense.paper['hours']:.0%}"])  # fmt: skip
    least, most = min(implied, key=implied.__getitem__), max(implied, key=implied.__getitem__)
    text = "\n## The paper's hours and the formula\n\n"
    headings = ["recipe", "hours, paper", f"at {UTILISATION:.0%}", "share of the peak that the paper's hours imply"]
    headings += ["at the share of `table1-llava`", "that, of the paper's", "FLOPs of it", "hours of it, paper"]
    text += table(headings, body)
    return text + UNEQUAL.format(
        least=least, least_share=implied[least], most=most, most_share=implied[most], text=TEXT
    )


def page() -> str:
    """The whole page."""
    head = HEAD.format(gpus=MACHINE.gpus, utilisation=UTILISATION, peak=f"{MACHINE.gpu.tflops:g}")
    return head + data_section() + "".join(map(table_section, TITLES)) + hours_section()
