"""A template decides how an answer ends: what is saved of it, and that an answer stops there and is cut there."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    pipeline,
)
from typer.testing import CliRunner

from eval.answering.generate import Generator, numerics
from eval.answering.models import check_model
from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.checkpoints import load_checkpoint
from llava_skip.conversation import load_template, template_names
from llava_skip.convert import convert
from llava_skip.ends import ends_of, find_ends
from llava_skip_base.console import make_app
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from tests.support.conversations import SPECIAL, byte_tokenizer, random_image
from tests.support.small_models import small_config
from tests.support.stand_ins import language_model, vision_tower

CASE = Path(__file__).parents[1] / "cases/ckpt/llama3_base"
BASE_EOS, EOT, IM_END = 2, 6, 8  # </s>, <|eot_id|>, <|im_end|>
TOKENS = [*SPECIAL, "<|im_start|>", "<|im_end|>"]
TURNS = "{{% for turn in messages %}}{{{{ turn['content'] }}}}{}{{% endfor %}}"
# Template -> ids and texts that end its answers, where the tokenizer has the template's control tokens.
EXPECTED = {
    **dict.fromkeys(("v1", "llava_v1", "mistral", "llama_2", "llava_llama_2", "llama3_plain"), ((BASE_EOS,), ())),
    **dict.fromkeys(("chatml", "qwen", "mpt", "smollm2"), ((IM_END, BASE_EOS), ())),
    **dict.fromkeys(("llama3", "llama3_double_bos"), ((EOT, BASE_EOS), ())),
    "v0": ((BASE_EOS,), ("###",)),
    "plain": ((BASE_EOS,), ("\n",)),
}


def test_every_template_of_the_library_has_its_ends():
    assert set(EXPECTED) == set(template_names())
    for name, (ids, strings) in EXPECTED.items():
        ends = find_ends(load_template(name), byte_tokenizer(TOKENS))
        assert (ends.ids, ends.strings) == (ids, strings), name


@pytest.mark.parametrize(
    ("template", "ids", "strings"),
    [
        (TURNS.format("<|im_end|>"), (IM_END, BASE_EOS), ()),
        (TURNS.format(" <|im_end|>\n"), (IM_END, BASE_EOS), ()),
        (TURNS.format("\n### End<|im_end|>"), (IM_END, BASE_EOS), ("\n### End",)),
        (TURNS.format("<|im_end|></s>"), (IM_END, BASE_EOS), ()),
        (TURNS.format("<|nobody|>\n"), (BASE_EOS,), ("<|nobody|>",)),
        # LLaVA's own of the hub: it shows only lists of parts, and writes a space after an answer.
        (
            "{% for m in messages %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
            "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}",
            (BASE_EOS,),
            (),
        ),
        (
            "{% for m in messages %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
            "{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}{% endfor %}",
            (IM_END, BASE_EOS),
            (),
        ),
        ("{{ raise_exception('nothing is taken') }}", (BASE_EOS,), ()),
        (TURNS.format("<|im_end|>").replace("'] }}", "'] | upper }}"), (BASE_EOS,), ()),
        (None, (BASE_EOS,), ()),
    ],
)
def test_ends_of_other_templates(template, ids, strings):
    ends = find_ends(template, byte_tokenizer(TOKENS))
    assert (ends.ids, ends.strings) == (ids, strings)


def test_a_control_token_that_the_tokenizer_does_not_have_is_a_text():
    ends = find_ends(load_template("qwen"), byte_tokenizer())
    assert (ends.ids, ends.strings, ends.texts) == ((BASE_EOS,), ("<|im_end|>",), ("<|im_end|>",))


def test_a_tokenizer_with_several_templates_ends_as_its_default():
    tokenizer = byte_tokenizer(TOKENS)
    tokenizer.chat_template = {"default": load_template("chatml"), "tools": load_template("v0")}
    assert ends_of(tokenizer).ids == (IM_END, BASE_EOS)


def test_ids_are_added_and_texts_replaced():
    config = GenerationConfig(eos_token_id=40, stop_strings=["###"])
    find_ends(load_template("chatml"), byte_tokenizer(TOKENS)).save_in(config)
    assert (config.eos_token_id, config.stop_strings) == ([IM_END, BASE_EOS, 40], None)
    find_ends(load_template("v0"), byte_tokenizer(TOKENS)).save_in(config)
    assert (config.eos_token_id, config.stop_strings) == ([BASE_EOS, IM_END, 40], ["###"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A language model that ends with </s>, and a tower."""
    folder = tmp_path_factory.mktemp("sources")
    byte_tokenizer(TOKENS).save_pretrained(folder / "words")
    language_model(folder / "llm", folder / "words")
    vision_tower(folder / "clip")
    return folder


def run_convert(*words):
    result = CliRunner().invoke(make_app(convert), [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("template", "ids", "strings"),
    [("llama3", [EOT, BASE_EOS], None), ("v0", [BASE_EOS], ["###"]), ("qwen", [IM_END, BASE_EOS], None)],
)
def test_a_join_saves_the_ends_of_its_template(sources, tmp_path, template, ids, strings):
    joined = [sources / "llm", tmp_path / "joined", "--vision-tower", sources / "clip", "--template", template]
    run_convert(*joined, "--preset", "llava")
    # The same in what is loaded and saved again, and in the other layout.
    load_checkpoint(tmp_path / "joined").save_pretrained(tmp_path / "again")
    run_convert(tmp_path / "joined", tmp_path / "hub", "--to", "llava-hf")
    for name in ("joined", "again", "hub"):
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert (saved["eos_token_id"], saved.get("stop_strings")) == (ids, strings), name


def test_a_base_that_ends_otherwise_than_its_template(sources, tmp_path):
    """A case from outside: `<|end_of_text|>` of a LLaMA-3 base, where answers end with `<|eot_id|>`."""
    base = shutil.copytree(CASE, tmp_path / "base")
    LlamaForCausalLM(LlamaConfig(**read_json(CASE / "config.json"))).save_pretrained(base)
    run_convert(base, tmp_path / "out", "--vision-tower", sources / "clip", "--template", "llama3", "--preset", "llava")
    ends = read_json(tmp_path / "out/generation_config.json")["eos_token_id"]
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|eot_id|>", "<|end_of_text|>"]


class Script(LogitsProcessor):
    """Makes a model say certain tokens."""

    def __init__(self, tokens: list[int], prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[said]] = 0
        return forced


@pytest.fixture(params=[("v0", "###"), ("qwen", "<|im_end|>"), ("chatml", "<|im_end|>")], ids=["v0", "qwen", "chatml"])
def speaker(request, tmp_path):
    """A folder whose generation configuration names no end but </s>; its template; the text that it would say."""
    template, end = request.param
    config = small_config(vocab_size=400, max_position_embeddings=2048)
    config.image_token_index, config.text_config.eos_token_id = 3, BASE_EOS
    LlavaSkipForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer([*SPECIAL, "<|im_start|>"])
    tokenizer.add_tokens(["<|im_end|>"])  # not special: it is shown by decode
    LlavaSkipProcessor.for_config(config, tokenizer, template).save_pretrained(tmp_path)
    return tmp_path, f" 6{end} and more of it{end}"


def test_an_evaluation_stops_at_the_end_and_cuts_it(speaker):
    folder, said = speaker
    generator = Generator(check_model(folder), numerics())
    turns = [{"role": "user", "content": "How many?"}]
    prompt = generator.processor.apply_chat_template([turns], add_generation_prompt=True, tokenize=True)[0]
    inner, lengths = generator.model.generate, []

    def generate(**inputs):
        tokens = generator.tokenizer(said, add_special_tokens=False)["input_ids"]
        inputs["logits_processor"].append(Script(tokens, inputs["input_ids"].shape[1]))
        output = inner(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    generator.model.generate = generate
    assert len(prompt) > 10
    assert generator.reply([turns], 30) == ["6"]
    assert lengths[0] in (5, 3)  # " 6###" in bytes, or with one token for the end
    assert generator.reply([turns, turns], 30) == ["6", "6"]
    (six,) = generator.tokenizer("6", add_special_tokens=False)["input_ids"]
    generator.model.generation_config.eos_token_id.append(six)  # an end that only the folder names
    assert generator.reply([turns], 30) == [""]


def test_a_pipeline_stops_at_the_end_and_cuts_it(speaker):
    folder, said = speaker
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaSkipForConditionalGeneration.from_pretrained(folder)
    ends_of(processor).save_in(model.generation_config)
    model.save_pretrained(folder)
    content = [{"type": "image", "image": random_image()}, {"type": "text", "text": "How many?"}]
    turns = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    width = inputs["input_ids"].shape[1]
    tokens = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    options = {"generate_kwargs": {"logits_processor": [Script(tokens, width)], "max_new_tokens": 20}}
    ask = partial(pipeline("image-text-to-text", model=str(folder)), return_full_text=False, **options)
    assert ask(text=turns)[0]["generated_text"] == " 6"
    # Nothing but the special tokens is taken from what is decoded as it is.
    output = AutoModelForImageTextToText.from_pretrained(folder).generate(**inputs, **options["generate_kwargs"])
    assert output.shape[1] < width + 6
    shown = processor.post_process_image_text_to_text(output, skip_special_tokens=False)[0]
    assert shown.endswith(said[: said.index(" and")])
    assert processor.post_process_image_text_to_text(output[0])[0].endswith("\n 6" if "im_end" in said else ": 6")


def test_a_text_that_only_contains_the_end_is_left_whole():
    tokenizer = byte_tokenizer()
    config = small_config(vocab_size=400)
    config.image_token_index = 3
    processor = LlavaSkipProcessor.for_config(config, tokenizer, "v0")
    prompt = tokenizer("A chat.###Human: hello###Assistant:")["input_ids"]
    assert processor.post_process_image_text_to_text([prompt]) == ["A chat.###Human: hello###Assistant:"]
    longer = [*prompt, *tokenizer(" 6#", add_special_tokens=False)["input_ids"]]
    assert processor.post_process_image_text_to_text([longer])[0].endswith("Assistant: 6#")


def test_a_model_that_is_nowhere_asks_for_its_tokenizer():
    config = small_config()
    model = LlavaSkipForConditionalGeneration(config)
    model.generation_config.stop_strings = ["###"]
    with pytest.raises(UserError, match=r"ends an answer with the text \['###'\].*give generate tokenizer="):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    output = model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, tokenizer=byte_tokenizer())
    assert output.shape[1] == 4
