import io

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from llava_skip import LlavaSkipProcessor
from llava_skip.conversation import LLAVA_VERSIONS, load_template, template_names
from tests.support.conversations import SPECIAL, TURNS, byte_tokenizer, random_image, segments
from tests.support.small_models import small_config

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
USER = HUMAN.replace("human", "user")
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful and honest multimodal assistant.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
# Unsupervised and supervised text in turn, of a conversation of two rounds (the tokenizer adds BOS).
EXPECTED = {
    "v1": (
        f"<s>{USER} USER: <image>\nWhat is this? ASSISTANT:", " A cat.</s>",
        "USER: What color? ASSISTANT:", " Black and white.</s>",
    ),
    "llava_v1": (
        f"<s>{HUMAN} USER: <image>\nWhat is this? ASSISTANT:", " A cat.</s>",
        "USER: What color? ASSISTANT:", " Black and white.</s>",
    ),
    "v0": (
        f"<s>{HUMAN}###Human: <image>\nWhat is this?###Assistant:", " A cat.###",
        "Human: What color?###Assistant:", " Black and white.###",
    ),
    "llava_llama_2": (
        f"<s>[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n<image>\nWhat is this? [/INST]", " A cat. </s>",
        "<s>[INST] What color? [/INST]", " Black and white. </s>",
    ),
    "mistral": (
        "<s>[INST] <image>\nWhat is this? [/INST]", " A cat. </s>",
        "[INST] What color? [/INST]", " Black and white. </s>",
    ),
    "chatml": (
        "<s><|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is this?<|im_end|>"
        "<|im_start|>assistant\n", "A cat.<|im_end|>",
        "<|im_start|>user\nWhat color?<|im_end|><|im_start|>assistant\n", "Black and white.<|im_end|>",
    ),
    "mpt": (
        f"<s><|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nWhat is this?<|im_end|>"
        "<|im_start|>assistant\n", "A cat.<|im_end|>",
        "<|im_start|>user\nWhat color?<|im_end|><|im_start|>assistant\n", "Black and white.<|im_end|>",
    ),
    "llama3": (
        f"<s>{LLAMA3}", "A cat.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhat color?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "Black and white.<|eot_id|>",
    ),
    "llama3_double_bos": (
        f"<s><s>{LLAMA3}", "A cat.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhat color?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "Black and white.<|eot_id|>",
    ),
}  # fmt: skip


def processor_of(template, bos=True):
    config = small_config(vocab_size=400)
    config.image_token_index = 3
    tokenizer = byte_tokenizer([*SPECIAL, "<|im_start|>", "<|im_end|>"], bos=bos)
    processor = LlavaSkipProcessor.for_config(config, tokenizer, "v1")
    processor.chat_template = template
    return processor


@pytest.mark.parametrize("name", EXPECTED)
def test_segments(name):
    processor = processor_of(load_template(name))
    found = segments(processor, processor.encode_conversation(TURNS, [random_image()]))
    assert found == [(bool(i % 2), text) for i, text in enumerate(EXPECTED[name])]


def test_llama_2_differs_from_llavas_only_in_the_system_message():
    processor = processor_of(load_template("llama_2"))
    found = segments(processor, processor.encode_conversation(TURNS, [random_image()]))
    expected = EXPECTED["llava_llama_2"]
    assert found[0][1].startswith("<s>[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.")
    assert "while being safe.  Your answers" in found[0][1] and found[0][1].endswith(
        "\n<</SYS>>\n\n<image>\nWhat is this? [/INST]"
    )
    assert [text for _, text in found[1:]] == list(expected[1:])


def test_qwen_ends_each_turn_with_a_line_end_that_is_not_supervised():
    processor = processor_of(load_template("qwen"), bos=False)
    assert [text for _, text in segments(processor, processor.encode_conversation(TURNS, [random_image()]))] == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?"
        "<|im_end|>\n<|im_start|>assistant\n",
        "A cat.<|im_end|>",
        "\n<|im_start|>user\nWhat color?<|im_end|>\n<|im_start|>assistant\n",
        "Black and white.<|im_end|>",
        "\n",
    ]


@pytest.mark.parametrize(("name", "end"), [("plain", "\n"), ("llama3_plain", " ")])
def test_plain_is_the_image_and_its_caption(name, end):
    processor = processor_of(load_template(name))
    found = segments(processor, processor.encode_conversation(TURNS[:2], [random_image()]))
    assert found == [(False, "<s><image>"), (True, f"A cat.{end}")]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("v1", "<s>Be brief. USER: <image>\nWhat is this? ASSISTANT:"),
        ("v0", "<s>Be brief.###Human: <image>\nWhat is this?###Assistant:"),
        ("mistral", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST]"),
    ],
)
def test_a_system_turn_replaces_the_default_one(name, start):
    processor = processor_of(load_template(name))
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert segments(processor, processor.encode_conversation(turns, [random_image()]))[0] == (False, start)


@pytest.mark.parametrize("name", sorted(set(template_names()) - {"plain", "llama3_plain"}))
def test_a_prompt_is_the_beginning_of_what_is_trained(name):
    processor = processor_of(load_template(name))
    prompt = processor.apply_chat_template(TURNS[:1], add_generation_prompt=True)
    text, spans = processor.render_conversation(TURNS)
    assert text.startswith(prompt) and spans[0][0] == len(prompt)


def test_every_version_of_llava_names_a_template():
    assert set(LLAVA_VERSIONS.values()) <= set(template_names())
    assert all("{%- include" not in load_template(name) for name in template_names())


def without_marks(name):
    return load_template(name).replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


@pytest.mark.parametrize("name", ["v1", "llama_2", "qwen"])
def test_a_template_without_marks_has_the_same_labels(name):
    # A tokenizer's own template ends a turn with its end token, which is what is looked for.
    swap = ("<|im_end|>", "</s>") if name == "qwen" else ("", "")
    marked, own = (processor_of(text.replace(*swap)) for text in (load_template(name), without_marks(name)))
    expected, found = (p.encode_conversation(TURNS, [random_image()]) for p in (marked, own))
    assert found["input_ids"] == expected["input_ids"]
    labelled = [[text.strip() for supervised, text in segments(marked, s) if supervised] for s in (expected, found)]
    assert labelled[0] == labelled[1]


def test_a_template_that_changes_earlier_turns_is_refused():
    template = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' and loop.last -%}<think></think>{%- endif -%}"
        "{{ m.role }}: {{ m.content }}</s>{%- endfor -%}{%- if add_generation_prompt -%}assistant: {%- endif -%}"
    )
    with pytest.raises(ValueError, match="renders turn 1 differently alone than inside.*--template"):
        processor_of(template).encode_conversation(TURNS, [random_image()])


def test_a_template_that_refuses_a_conversation_says_why():
    with pytest.raises(ValueError, match="refuses this conversation: no system turns here"):
        processor_of("{{ raise_exception('no system turns here') }}").encode_conversation(TURNS, [])


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    words = ["A cat. Black and white. What is this? What color? USER: ASSISTANT: [INST] [/INST]"] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=True, minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


@pytest.mark.parametrize(
    ("name", "supervised"),
    [
        ("v1", [["▁A", "▁cat", ".", "</s>"], ["▁Black", "▁and", "▁white", ".", "</s>"]]),
        ("llava_llama_2", [["▁A", "▁cat", ".", "▁", "</s>"], ["▁Black", "▁and", "▁white", ".", "▁", "</s>"]]),
    ],
)
def test_sentencepiece_tokens_that_are_supervised(llama_tokenizer, name, supervised):
    config = small_config(vocab_size=500)
    config.image_token_index = llama_tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaSkipProcessor.for_config(config, llama_tokenizer, name)
    sample = processor.encode_conversation(TURNS, [random_image()])
    runs, tokens = [[]], llama_tokenizer.convert_ids_to_tokens(sample["input_ids"])
    for token, label in zip(tokens, sample["labels"], strict=True):
        if label != -100:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    assert [run for run in runs if run] == supervised
