"""What would be silently wrong, or end the engine, in a model that forgets: each with its cure, against `generate`."""

import pytest
import torch

from tests.support.conversations import random_image
from tests.support.small_models import SKIP
from tests.vllm.engines import NEW, answers, engine, greedy, prompts, questions, save, tokens

TABLE = 256
"""Positions of the models."""


def ask(text: str, *seeds: int) -> list:
    """One conversation with an image for each seed."""
    content = [{"type": "image", "image": random_image(seed=seed)} for seed in seeds]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "forgets", SKIP)


@pytest.fixture(scope="module")
def llm(folder):
    """With the settings that would be wrong, and room for few requests."""
    wrong = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    with engine(folder, **wrong, num_gpu_blocks_override=12) as made:
        yield made


def test_the_plugin_sets_what_it_needs(llm):
    config = llm.llm_engine.vllm_config
    scheduler, length = config.scheduler_config, config.model_config.max_model_len
    assert length == TABLE
    assert not config.cache_config.enable_prefix_caching
    assert not scheduler.enable_chunked_prefill
    assert scheduler.max_num_batched_tokens == scheduler.max_num_encoder_input_tokens == TABLE
    assert scheduler.encoder_cache_size == 3 * TABLE
    assert config.model_config.hf_config.text_config.max_position_embeddings == 2 * TABLE


def test_a_cached_prefix_is_not_taken(llm, folder):
    """The second question would find the blocks of the images, and not their skipped rows."""
    before = "An answer to the question about the images: "  # more than a block
    asked = [ask(before + text, 1, 2, 3, 4) for text in ("what?", "where is it?")]
    for own, expected in zip(asked, answers(folder, asked), strict=True):
        (output,) = llm.generate(prompts(folder, [own]), greedy(), use_tqdm=False)
        assert not output.num_cached_tokens
        assert tokens([output]) == [expected]


def test_a_prompt_longer_than_a_step_of_64_tokens_is_not_cut(llm, folder):
    asked = [ask("word " * 20, *range(6)), *questions(6)]
    assert tokens(llm.generate(prompts(folder, asked), greedy(), use_tqdm=False)) == answers(folder, asked)


def test_positions_beyond_the_rotary_table(llm, folder):
    """30 images are 210 rows, and 420 positions."""
    asked = [ask("And now?", *range(30))]
    (output,) = llm.generate(prompts(folder, asked), greedy(), use_tqdm=False)
    assert len(output.prompt_token_ids) + NEW < TABLE
    assert tokens([output]) == answers(folder, asked)


def test_the_first_token_is_as_the_library_has_it(llm, folder):
    """The template writes none, and vLLM tokenises a chat without it."""
    asked = [ask("What is this?", 1), ask("Text alone")]
    expected = answers(folder, asked)
    chats = [
        [{"role": "user", "content": [_for_vllm(part) for part in own[0]["content"]]}] for own in asked
    ]  # fmt: skip
    outputs = llm.chat(chats, greedy(), use_tqdm=False)
    assert tokens(outputs) == expected
    assert [output.prompt_token_ids.count(1) for output in outputs] == [1, 1]
    written = [prompt | {"prompt": "<s>" + prompt["prompt"]} for prompt in prompts(folder, asked)]
    assert tokens(llm.generate(written, greedy(), use_tqdm=False)) == expected


def _for_vllm(part):
    return {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part


def test_beam_search_hands_generated_tokens_back_as_prompt(llm, folder):
    from vllm.sampling_params import BeamSearchParams

    asked = questions(4)
    for width in (1, 3):
        expected = answers(folder, asked, 6, num_beams=width, eos_token_id=None)
        params = BeamSearchParams(beam_width=width, max_tokens=6, ignore_eos=True)
        for prompt, own in zip(prompts(folder, asked), expected, strict=True):
            (found,) = llm.beam_search([prompt], params)
            assert found.sequences[0].tokens[-6:] == own


def test_three_answers_to_one_prompt(llm, folder):
    asked = questions(6)
    params = greedy()
    params.n, params.temperature, params.top_k = 3, 1.0, 1
    for output, expected in zip(
        llm.generate(prompts(folder, asked), params, use_tqdm=False), answers(folder, asked), strict=True
    ):
        assert [list(own.token_ids) for own in output.outputs] == [expected] * 3


def preemptions(llm) -> int:
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_a_request_that_was_preempted_begins_again(llm, folder):
    """It is computed with its generated tokens, which must not see skipped rows."""
    asked, before = questions(18), preemptions(llm)
    found = llm.generate(prompts(folder, asked), greedy(70), use_tqdm=False)
    assert preemptions(llm) - before >= 5
    assert tokens(found) == answers(folder, asked, 70)


def test_the_trial_run_has_as_many_rows_as_images_can_have(llm, folder):
    """vLLM measures memory with it."""
    from vllm.forward_context import set_forward_context

    def trial(model) -> list[int]:
        seen, config = [], llm.llm_engine.vllm_config
        layer = model.language_model.model.layers[0]
        handle = layer.self_attn.qkv_proj.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
        model._most_rows = TABLE
        with set_forward_context(None, config), torch.inference_mode():
            for rows in (TABLE, 8, TABLE):
                place = torch.zeros(3, rows, dtype=torch.long)
                model(None, place, None, torch.zeros(rows, config.model_config.get_hidden_size()))
        handle.remove()
        return seen

    assert llm.apply_model(trial) == [[2 * TABLE, TABLE, 8, TABLE]]  # 14 tokens of an image, 7 kept


def test_guessed_tokens(folder):
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    asked = questions(6)
    with engine(folder, own_process=True, speculative_config=guess) as llm:
        assert tokens(llm.generate(prompts(folder, asked), greedy(40), use_tqdm=False)) == answers(folder, asked, 40)
        counts = {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if "spec_decode" in metric.name and hasattr(metric, "value")
        }
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.slow
def test_a_compiled_model_skips_too(folder):
    """Also where an image is in the encoder's cache already, so that vLLM takes the forward for one without images."""
    asked = questions(6)
    with engine(folder, enforce_eager=False) as llm:
        for _ in range(2):
            assert tokens(llm.generate(prompts(folder, asked), greedy(), use_tqdm=False)) == answers(folder, asked)
