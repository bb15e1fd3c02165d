import copy
import io
import re
import signal
from itertools import groupby

import pytest
import sentencepiece
from tokenizers import normalizers
from transformers import LlamaTokenizer

from llava_skip import LlavaSkipProcessor
from llava_skip.conversation import LLAVA_VERSIONS, load_template, template_names
from llava_skip.ends import ends_of
from llava_skip.foreign_templates import EndlessTemplate
from llava_skip.processing import begins_text_with_space
from llava_skip_base.errors import UserError
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
    with pytest.raises(ValueError, match=r"fails \(TemplateError: no system turns here\); correct it, or name"):
        processor_of("{{ raise_exception('no system turns here') }}").encode_conversation(TURNS, [])


LOOP = "{%% for %s in range(99999) %%}%s{%% endfor %%}"
ENDLESS = LOOP % ("a", LOOP % ("b", LOOP % ("c", "")))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% generation %}{{ 1 / 0 }}{% endgeneration %}", "ZeroDivisionError"),
    ],
)
def test_an_error_in_a_template_is_one_message(template, message):
    with pytest.raises(UserError, match=rf"^The conversation template fails \({message}: "):
        processor_of(template).encode_conversation(TURNS, [])
    assert ends_of(processor_of(template)).strings == ()  # it may still take other conversations


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("llava_skip.foreign_templates.SECONDS", 0.05)
    for use in (ends_of, lambda processor: processor.encode_conversation(TURNS, [])):
        with pytest.raises(EndlessTemplate, match=r"^The conversation template does not end within 0.05 s; correct it"):
            use(processor_of(ENDLESS))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model as LLaMA's."""
    words = ["A cat. Black and white. What is this? What color? USER: ASSISTANT: [INST] [/INST]"] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=True, minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def tokenizer_of(pieces, folder, **flags):
    (folder / "tokenizer.model").write_bytes(pieces)
    tokenizer = LlamaTokenizer.from_pretrained(folder, **flags)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


@pytest.fixture(scope="module")
def llama_tokenizer(pieces, tmp_path_factory):
    return tokenizer_of(pieces, tmp_path_factory.mktemp("llama"), legacy=False)


def llama_processor(tokenizer, name):
    config = small_config(vocab_size=500)
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaSkipProcessor.for_config(config, tokenizer, name)


def llavas_ids(pieces, text, legacy):
    """What LLaVA's own code gives with the tokenizer that it was made for, one -1 an image, by SentencePiece alone.

    Each text between images is tokenised for itself. That tokenizer cuts it at </s> and <s>. Without `legacy` only the
    first part begins with a space, and none does whose text is empty.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    assert model.decode(model.encode(":")[:1]) == "" and len(model.encode(":")) == 2

    def part(words, begins):
        return model.encode(words) if begins else model.encode(f":{words}")[2:]

    ids = [model.bos_id()]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [-1] if number else []
        for place, words in enumerate(re.split("(</?s>)", chunk)):
            if words in ("<s>", "</s>"):
                ids.append(model.piece_to_id(words))
            elif words:
                ids += part(words, legacy or place == 0)
    return ids


CONVERSATIONS = {
    "image first": TURNS,
    "image last": [{"role": "user", "content": "What is this?\n<image>"}, *TURNS[1:]],
    "images inside": [{"role": "user", "content": "<image> and <image>A cat.<image><image>\nWhat"}, *TURNS[1:]],
    "image alone": [{"role": "user", "content": "<image>"}, *TURNS[1:]],
    "text": TURNS[2:],
}


@pytest.mark.parametrize("flags", [{"legacy": True}, {"legacy": False}, {}], ids=str)
@pytest.mark.parametrize("name", ["v1", "llava_v1", "llava_llama_2", "mistral", "plain", "v0"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_ids_are_llavas_whatever_the_tokenizers_flags(pieces, tmp_path, flags, name, kind):
    turns = CONVERSATIONS[kind]
    tokenizer = tokenizer_of(pieces, tmp_path, **flags)
    processor = llama_processor(tokenizer, name)
    text, _ = processor.render_conversation(turns)
    expected = llavas_ids(pieces, text, flags.get("legacy", False))

    def images_as_one(ids):
        image = processor.image_token_id
        runs = [list(run) for _, run in groupby(ids, lambda token: token == image)]
        return [one for run in runs for one in ([-1] * (len(run) // tokens) if run[0] == image else run)]

    ids, supervised = processor.tokenize_conversation(turns)
    tokens = 1
    assert images_as_one(ids.tolist()) == expected
    tokens = processor.image_seq_length
    images = [random_image()] * text.count("<image>")
    sample = processor.encode_conversation(turns, images)
    assert images_as_one(sample["input_ids"]) == expected
    labels = [token for token in sample["labels"] if token != -100]
    assert labels == ids[supervised].tolist() and labels
    asked = processor(images=[images] if images else None, text=[text])["input_ids"][0]
    assert asked == sample["input_ids"]


def test_nothing_is_written_behind_the_last_image(llama_tokenizer):
    processor = llama_processor(llama_tokenizer, "plain")
    ids = processor(images=[[random_image()]], text=["<image>"])["input_ids"][0]
    assert ids == [1] + [processor.image_token_id] * processor.image_seq_length


def test_a_tokenizer_of_bytes_gets_no_space():
    assert not begins_text_with_space(byte_tokenizer())


def test_a_tokenizer_that_says_so_has_no_first_token(pieces, tmp_path):
    for given, first in ((None, 1), (True, 1), (False, None)):
        flags = {} if given is None else {"add_bos_token": given}
        tokenizer = llama_processor(tokenizer_of(pieces, tmp_path, **flags), "v1").tokenizer
        assert (tokenizer("A cat")["input_ids"][0] == 1) == (first == 1)


def test_a_tokenizer_that_puts_a_space_before_every_part_gets_no_second_one(llama_tokenizer):
    """As files of older releases do it."""
    old = copy.deepcopy(llama_tokenizer)
    backend = old.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found = [
        llama_processor(each, "v1").tokenize_conversation(TURNS[:2])[0].tolist() for each in (old, llama_tokenizer)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "supervised"),
    [
        ("v1", [["▁A", "▁cat", ".", "</s>"], ["▁Black", "▁and", "▁white", ".", "</s>"]]),
        ("llava_llama_2", [["▁A", "▁cat", ".", "▁", "</s>"], ["▁Black", "▁and", "▁white", ".", "▁", "</s>"]]),
    ],
)
def test_sentencepiece_tokens_that_are_supervised(llama_tokenizer, name, supervised):
    processor = llama_processor(llama_tokenizer, name)
    sample = processor.encode_conversation(TURNS, [random_image()])
    runs, tokens = [[]], llama_tokenizer.convert_ids_to_tokens(sample["input_ids"])
    for token, label in zip(tokens, sample["labels"], strict=True):
        if label != -100:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    assert [run for run in runs if run] == supervised
