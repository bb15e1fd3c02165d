"""The bench: one set of weights, FLOPs that torch counts, memory to the byte, exponents, pages of every mode."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from eval.study.bench import app
from eval.study.speed import agreement, device, tasks
from eval.study.speed.agreement import compare_outputs, compare_with_cpu
from eval.study.speed.growth import PRESETS_AXIS, Growth, fit, growth_table, measure_growth
from eval.study.speed.measuring import Rounds, Spread, exponent, peak_bytes, take_turns, timed, try_call
from eval.study.speed.sizes import BENCH_SIZES, bench_config
from eval.study.speed.subjects import STOCK, Shape, Subject, build_subjects, cache_bytes
from eval.study.speed.variants import compare_attention, compare_caches
from eval.study.speed.whole import Outcome, Plan, measure_whole
from llava_skip.flops import image_cost
from llava_skip.gpus import Gpu
from llava_skip.memory import cache_token_bytes
from llava_skip.presets import PRESETS
from llava_skip_base.files import read_json

CPU = torch.device("cpu")
SHAPE = Shape(samples=2, images=1, text=20)
ONCE = Rounds(1, 0)
FAST = ("--repeats", 1, "--seconds", 0)


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return build_subjects(["sv-llava-64", "sv-llava-hd", "sv-cos"], "tiny", "cpu", torch.float32)


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def run(*words: object) -> str:
    done = bench(*words)
    assert done.exit_code == 0, done.output + done.stderr + repr(done.exception)
    return done.output


def test_all_models_have_one_copy_of_the_weights(subjects: list[Subject]) -> None:
    names = ["llava", STOCK, "sv-llava-64", "llava-hd", "sv-llava-hd", "cos", "sv-cos"]
    assert [own.name for own in subjects] == names
    assert [own.reference for own in subjects] == ["llava", "llava", "llava", "llava-hd", "llava-hd", "cos", "cos"]
    first = subjects[0].model
    for subject in subjects:
        model = subject.model
        assert model.lm_head.weight is first.lm_head.weight
        assert model.model.language_model.layers[-1].mlp.up_proj.weight is (
            first.model.language_model.layers[-1].mlp.up_proj.weight
        )
        assert not any(p.requires_grad for p in model.model.vision_tower.parameters())
        assert all(p.requires_grad for p in model.model.language_model.parameters())
        assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    mine, theirs = (tasks.prefill(own, SHAPE)().logits for own in subjects[:2])
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "sv-llava-64", "llava-hd", "sv-llava-hd", "cos", "sv-cos"])
def test_the_ideal_is_what_torch_counts(subjects: list[Subject], name: str) -> None:
    subject = next(own for own in subjects if own.name == name)
    shape = replace(SHAPE, images=2)
    inputs = subject.inputs(shape)
    subject.model.eval()
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count its fused kernel for CPUs
        with FlopCounterMode(display=False) as counter:  # it follows modules through their gradients
            subject.model(**prompt, logits_to_keep=1)
        assert counter.get_total_flops() == subject.prefill_flops(shape).forward
        subject.model.train()
        with FlopCounterMode(display=False) as counter:
            subject.model(**inputs).loss.backward()
        assert counter.get_total_flops() == subject.training_flops(shape).model
    subject.model.zero_grad(set_to_none=True)


def test_a_training_step_leaves_the_weights_and_no_gradients(subjects: list[Subject]) -> None:
    before = {name: p.clone() for name, p in subjects[2].model.named_parameters()}
    trainer = tasks.Trainer(subjects)
    moments = len(trainer.optimizer.state)
    tasks.training(subjects[2], SHAPE, trainer)()
    assert moments == len({id(p) for own in subjects for p in own.model.parameters() if p.requires_grad})
    for name, parameter in subjects[2].model.named_parameters():
        assert parameter.grad is None
        torch.testing.assert_close(parameter, before[name], atol=1e-9, rtol=1e-9)


def test_the_cache_of_a_sample_and_decoding_from_it(subjects: list[Subject]) -> None:
    for subject in subjects:
        prompt = tasks.prefill(subject, Shape(1, 1, 20))()
        stored, held = cache_bytes(prompt.past_key_values)
        tokens = image_cost(subject.config, 20).cache_tokens + 20
        assert stored == tokens * cache_token_bytes(subject.config.text_config, element=4) <= held
        decoding = tasks.Decoding(subject, prompt, samples=3, steps=2)
        before = decoding.cache.get_seq_length()
        decoding()
        decoding()
        assert decoding.cache.get_seq_length() == before
        assert decoding.cache.layers[0].keys.shape[0] == 3
        assert cache_bytes(prompt.past_key_values)[0] == stored


def test_the_peak_is_counted_to_the_byte() -> None:
    kept = torch.zeros(1000)

    def call() -> torch.Tensor:
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1
        del first
        return (second * 2)[:10] + kept[:10]

    assert 2 * 2**20 <= peak_bytes(call, CPU) <= 2 * 2**20 + 1024
    assert peak_bytes(lambda: torch.zeros(2**18), CPU) == 2**20


def test_calls_take_turns_and_one_without_memory_is_left_out() -> None:
    order: list[str] = []

    def fails() -> dict[str, float]:
        order.append("b")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

    calls = {"a": timed("kind", lambda: order.append("a"), CPU), "b": fails, "c": lambda: {"x": 2.0, "y": 3.0}}
    found = take_turns(calls, Rounds(2, 0), "")
    assert order == ["a", "b", "a"]
    assert found["b"] == "CUDA out of memory. Tried to allocate"
    assert found["c"] == {"x": Spread((2.0, 2.0)), "y": Spread((3.0, 3.0))}
    assert len(list(Rounds(2, 0))) == 2 and len(list(Rounds(2, 60))) == 20
    assert Spread((3.0, 2.0, 5.0)).minimum == 2.0 and Spread((3.0, 2.0, 5.0)).spread == 0.5
    assert try_call(fails) == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    with pytest.raises(ZeroDivisionError):
        try_call(lambda: 1 / 0)


def test_ratios_are_those_of_a_sample_and_a_failure_is_a_row() -> None:
    def row(name: str, samples: int, seconds: float, flops: int) -> dict[str, Any]:
        own = {"measurement": "decode_budget", "name": name, "reference": "llava", "samples": samples}
        return own | {"seconds": seconds, "flops": flops}

    outcome = Outcome([row("llava", 4, 2.0, 400), row("fast", 16, 4.0, 800), row(STOCK, 4, 3.0, 400)])
    outcome.rows.append({"measurement": "failed", "name": "large", "reason": "no memory"})
    outcome.compare()
    assert [own.get("ratio") for own in outcome.rows] == [1.0, 0.5, 1.5, None]
    assert [own.get("over_ideal") for own in outcome.rows] == [1.0, 1.0, None, None]


def test_a_model_that_needs_too_much_memory_is_a_row_and_the_rest_goes_on(
    subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory() -> Any:
        raise torch.OutOfMemoryError("no room")

    for name in ("prefill", "answer"):
        real = getattr(tasks, name)
        monkeypatch.setattr(
            tasks, name, lambda own, *more, real=real: out_of_memory if own.name == "llava" else real(own, *more)
        )
    own = [subjects[0], subjects[2]]
    outcome = measure_whole(own, Plan(SHAPE, ONCE, (1,), 2, parts=("prefill", "answer", "decode")))
    found = {(row["name"], row["measurement"]) for row in outcome.rows}
    assert {kind for name, kind in found if name == "llava"} == {"failed"}
    kinds = {"prefill", "first_token", "next_token", "decode_1", "decode_budget"}
    assert {kind for name, kind in found if name == "sv-llava-64"} == kinds
    assert [cache["name"] for cache in outcome.caches] == ["sv-llava-64"]


def test_exponents_are_found_and_those_above_the_limit_are_named() -> None:
    assert exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)

    def row(name: str, value: int) -> dict[str, Any]:
        own = {"axis": "samples", "value": value, "measurement": "prefill", "name": name, "flops": value * len(name)}
        return own | {"seconds": value**2.0 * len(name), "peak_bytes": 7.0 * value}

    fits = fit([row(name, value) for name in ("a", "dense") for value in (1, 2, 4)])
    assert [(own["axis"], own["name"], own["above"]) for own in fits] == [
        ("samples", "a", ["seconds"]), ("samples", "dense", ["seconds"]), (PRESETS_AXIS, "all", [])
    ]  # fmt: skip
    assert fits[0]["seconds"] == pytest.approx(2) and fits[2]["seconds"] == pytest.approx(1)
    assert growth_table(fits)[1][-1] == "time"


def test_memory_grows_in_proportion(subjects: list[Subject]) -> None:
    own = [subject for subject in subjects if subject.name in ("sv-llava-64", "sv-llava-hd")]
    growth = Growth(Shape(1, 1, 20), {"images": (2, 8), "samples": (2, 8)}, ONCE)
    fits = fit(measure_growth(own, growth))
    assert len(fits) == 2 * (2 * 2 + 1)
    assert max(found["peak_bytes"] for found in fits) <= 1.1


def test_a_narrow_model_has_the_image_tokens_of_a_true_one() -> None:
    assert {"tiny", "width-512", "width-1024", "llama3-8b"} <= BENCH_SIZES.keys()
    for preset in PRESETS:
        assert bench_config(preset, "width-512").image_seq_length == bench_config(preset, "llama3-8b").image_seq_length


def test_the_whole_bench(tmp_path: Path) -> None:
    shown = run("whole", "--size", "tiny", "--presets", "sv-llava-64", "--decode", "1,2", "--steps", 2, *FAST,
                "--output", tmp_path)  # fmt: skip
    result = read_json(tmp_path / "tiny.json")
    found = {(row["measurement"], row["name"]): row for row in result["rows"]}
    kinds = ["train_step", "prefill", "first_token", "next_token", "decode_1", "decode_2", "decode_budget", "images"]
    names = ["llava", STOCK, "sv-llava-64"]
    own = {(kind, name) for kind in kinds for name in names if (kind, name) != ("images", STOCK)}
    assert found.keys() == own | {("merge", "sv-llava-64")}
    for kind in ("train_step", "prefill", "first_token"):
        row = found[kind, "sv-llava-64"]
        assert row["over_ideal"] == pytest.approx(row["ratio"] / row["flop_ratio"]) and row["flop_ratio"] < 1
        assert "ratio" in found[kind, STOCK] and "flop_ratio" not in found[kind, STOCK]
    largest = max(cache["stored_bytes"] for cache in result["caches"])
    for cache in result["caches"]:
        assert found["decode_budget", cache["name"]]["samples"] == 4 * largest // cache["stored_bytes"]
    page = (tmp_path / "tiny.md").read_text(encoding="utf-8")
    assert (tmp_path / "tiny.png").is_file() and "![tiny](tiny.png)" in page
    for title in ("Training step", "Prefill", "First token", "Decoding", "Before the language model"):
        assert f"## {title}" in page
    assert "equal memory" in shown and "not measured" not in shown


@pytest.mark.slow
def test_the_growth_bench(tmp_path: Path) -> None:
    shown = run("growth", "--presets", "sv-llava-64", "--text", 20, "--images", "1,2", "--texts", "20,40", "--batches",
                "2,1", *FAST, "--output", tmp_path)  # fmt: skip
    result = read_json(tmp_path / "growth-tiny.json")
    axes = {(row["axis"], row["measurement"], row["name"], row["value"]) for row in result["rows"]}
    assert len(axes) == len(result["rows"]) == 3 * 2 * 2 * 2 and ("text", "prefill", "sv-llava-64", 40) in axes
    assert {fit["axis"] for fit in result["fits"]} == {"images", "text", "samples", PRESETS_AXIS}
    samples = [fit["flops"] for fit in result["fits"] if fit["axis"] == "samples" and fit["measurement"] == "prefill"]
    assert samples == pytest.approx([1.0] * 2)
    assert (tmp_path / "growth-tiny.png").is_file() and "## Exponents" in (tmp_path / "growth-tiny.md").read_text()
    assert "grows with" in shown


def test_the_page_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_of_device", lambda _: Gpu(tflops=1.0, memory=1.0))
    names = ("--presets", "sv-llava-64", "--compared", "sv-llava-64", "--attention", "sdpa,eager,none_such")
    run("device", "--device", "cpu", "--size", "tiny", *names, "--text", 20, "--steps", 2, *FAST, "--output", tmp_path)
    page = next(tmp_path.glob("cpu-*.md")).read_text(encoding="utf-8")
    for title in (
        "Agreement with a CPU",
        "Training step",
        "Decoding",
        "Attention implementations",
        "Caches of generate",
    ):
        assert f"## {title}" in page
    result = read_json(next(tmp_path.glob("cpu-*.json")))
    assert [row["agrees"] for row in result["agreement"]] == [True, True]
    assert result["agreement"][0]["logits"] == 0.0 < result["agreement"][1]["logits"]
    rows = {row["attention"]: row for row in result["attention"] if row["name"] == "sv-llava-64"}
    assert (
        rows["eager"]["difference"] < 1e-5
        and rows["eager"]["prefill"] > 0
        and "none_such" in rows["none_such"]["reason"]
    )
    assert {row["cache"] for row in result["caches"]} == {"growing", "static"}
    assert not any("reason" in row for row in result["caches"])
    assert next(tmp_path.glob("cpu-*.png")).is_file() and "| MFU |" in page


def test_a_device_that_computes_something_else_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the second of four runs is the device's; in bfloat16 a CPU is as far off, so the device agrees."""
    one = {"logits": torch.tensor([[1.0, 2.0]]), "loss": torch.tensor(1.0), "gradient": torch.tensor([1.0])}
    expected = one | {"answer": torch.tensor([[1]])}
    other = compare_outputs(expected, expected | {"logits": torch.tensor([[2.2, 2.0]])})
    assert other["logits"] == pytest.approx(0.6) and other["same_first_choice"] == 0 and other["same_answer"]
    wrong = expected | {"loss": torch.tensor(1.1)}
    runs = iter([expected, wrong, wrong, wrong])
    monkeypatch.setattr(agreement, "_outputs", lambda _: next(runs))
    assert [row["agrees"] for row in compare_with_cpu(["llava"], "cpu")] == [False, True]


def test_what_is_no_number_does_not_agree() -> None:
    numbers = {"logits": 1e-5, "loss": 1e-6, "gradient": 1e-4}
    assert agreement.within(numbers, 1e-3)
    assert not any(agreement.within(numbers | {name: float("nan")}, 1e-3) for name in numbers)


def test_what_an_implementation_cannot_do_is_its_row(subjects: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    own = subjects[2:3]
    monkeypatch.setattr(tasks, "training", lambda *_: lambda: torch.zeros(2) @ torch.zeros(3))
    row = compare_attention(own, ["sdpa"], SHAPE, ONCE)[0]
    assert row["train_step"].startswith("RuntimeError") and row["prefill"] > 0 and row["difference"] == 0
    monkeypatch.setattr(
        tasks, "answer", lambda *_, **options: lambda: 1 / 0 if options else {"first_token": 1.0, "next_token": 0.5}
    )
    with pytest.raises(ZeroDivisionError):
        compare_caches(own, [1], SHAPE, 2, ONCE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["whole", "--presets", "sv-lava"], "unknown presets sv-lava; known: llava, sv-llava-64"),
        (["whole", "--size", "huge"], "--size is 'huge'; known: width-512"),
        (["whole", "--device", "tpu"], "--device is 'tpu'; it is cpu or cuda"),
        (["whole", "--decode", "1,x"], "--decode is '1,x'; give positive numbers"),
        (["growth", "--batches", "0"], "--batches is '0'; give positive numbers"),
        (["device", "--device", "cpu", "--parts", "whole,half"], "--parts has half; known: agreement"),
        (["device", "--device", "cpu", "--parts", ","], "--parts is ','; give names"),
        (["whole", "--presets", ""], "--presets is ''; give names"),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.exit_code == 2 and message in done.output + done.stderr
