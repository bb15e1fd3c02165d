"""Answers in turns: the cache of earlier turns changes no answer of a dense model, and forgets in a skipping one."""

from functools import partialmethod

import pytest
import torch
from transformers import MistralConfig
from transformers.cache_utils import DynamicCache

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.cache import ForgettingCache
from llava_skip.ends import Ends
from llava_skip.reduction import ReductionConfig
from llava_skip_base.errors import UserError
from serve.answering import Answerer, AnswerOptions, VisibleText, _can_go_on
from serve.chat import Chat
from serve.conversation import Conversation, Picture
from serve.loading import Loaded
from tests.support.conversations import byte_tokenizer, random_image
from tests.support.small_models import ARCHITECTURES, small_config

IMAGE = 3
DENSE = [name for name in ARCHITECTURES if not name.startswith("sv-")]


_PLAIN = (
    "{% for turn in messages %}[{{ turn.role }}]"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def loaded(tmp_path, architecture: str, **text) -> Loaded:
    config = small_config(None, architecture, vocab_size=400, **({"max_position_embeddings": 2048} | text))
    config.image_token_index = IMAGE
    torch.manual_seed(3)
    model = LlavaSkipForConditionalGeneration(config)
    return Loaded.of(tmp_path, model, LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1"))


def pictures(*sizes: tuple[int, int]) -> list[Picture]:
    return [Picture("one.png", b"", random_image(*size, seed=sum(size))) for size in sizes]


TURNS = [("What is this?", pictures((40, 20))), ("And?", []), ("These?", pictures((20, 50), (30, 30))), ("Why?", [])]


def talk(model: Loaded, keeps: bool, turns=TURNS, **options):
    """Answers and costs of a conversation; with `keeps` the cache goes on from turn to turn."""
    conversation, answerer, found = Conversation(), Answerer(model, **({"max_new_tokens": 6} | options)), []
    for question, images in turns:
        conversation.waiting = list(images)
        turn = conversation.ask(question)
        if not keeps:
            answerer.clear()
        shown: list[str] = []
        turn.answer, cost = answerer.answer(conversation, shown.append)
        assert "".join(shown).strip() == turn.answer
        found.append((turn.answer, cost))
    return found


@pytest.mark.parametrize("architecture", DENSE)
def test_the_cache_of_earlier_turns_changes_no_answer_of_a_dense_model(tmp_path, architecture):
    model = loaded(tmp_path, architecture)
    kept, fresh = talk(model, keeps=True), talk(model, keeps=False)
    assert [answer for answer, _ in kept] == [answer for answer, _ in fresh]
    assert len({answer for answer, _ in kept}) > 1
    assert [cost.reused > 0 for _, cost in kept] == [False, True, True, True]
    assert [cost.seen for _, cost in kept] == [cost.seen for _, cost in fresh]
    for _, cost in [*kept, *fresh]:
        assert cost.kept == cost.seen and cost.tokens == 6 and cost.first_seconds > 0 and cost.rate > 0


@pytest.mark.parametrize("architecture", ["sv-llava", "sv-llava-hd", "sv-cos"])
def test_a_cache_forgets_the_skipped_tokens_of_each_turns_images(tmp_path, architecture):
    model = loaded(tmp_path, architecture)
    dropped = model.model.config.skip_config.num_skipping
    costs = [cost for _, cost in talk(model, keeps=True)]
    assert [cost.seen - cost.kept for cost in costs] == [dropped, dropped, 3 * dropped, 3 * dropped]
    assert [before.seen - cost.reused < 10 for before, cost in zip(costs, costs[1:], strict=False)] == [True] * 3


def test_the_cache_of_an_answer_is_gone_on_with(tmp_path):
    """All of it, where the template writes the answer in the tokens that the model has."""
    model = loaded(tmp_path, "sv-llava")
    model.processor.chat_template = _PLAIN
    letters = {model.processor.tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefgh"}
    model.model.generation_config.suppress_tokens = [token for token in range(400) if token not in letters]
    first, second = (cost for _, cost in talk(model, keeps=True)[:2])
    assert first.tokens == 6 and second.reused == first.seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_is_what_the_processor_makes_of_the_conversation(tmp_path, architecture):
    model = loaded(tmp_path, architecture)
    conversation, answerer = Conversation(), Answerer(model, 1)
    for question, images in TURNS[:3]:
        conversation.waiting = list(images)
        conversation.ask(question).answer = "So."
    conversation.turns[-1].answer = None
    ids, images = answerer._prompt(conversation)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = model.processor.apply_chat_template(conversation.messages(), **options)
    assert ids == expected["input_ids"][0].tolist()
    for name, value in answerer._pixels(images, []).items():
        assert torch.equal(value, expected[name])


def test_a_turn_without_images_processes_none_and_renders_once(tmp_path, monkeypatch):
    model = loaded(tmp_path, "llava-hd")
    called: list[str] = []
    processor = model.processor
    for owner, name in ((type(processor), "apply_chat_template"), (type(processor.image_processor), "preprocess")):
        monkeypatch.setattr(owner, name, partialmethod(_noting, getattr(owner, name), called, name))
    talk(model, keeps=True)
    assert called.count("apply_chat_template") == 4 and called.count("preprocess") == 3


def _noting(self, original, called, name, *args, **kwargs):
    called.append(name)
    return original(self, *args, **kwargs)


@pytest.mark.parametrize("architecture", ["llava", "sv-llava"])
def test_an_exact_answer_is_that_of_a_new_pass(tmp_path, architecture):
    """The cache of a model that keeps every token is gone on with; one that has forgotten some is not kept."""
    model = loaded(tmp_path, architecture)
    kept, fresh = talk(model, keeps=True, exact=True), talk(model, keeps=False)
    assert [answer for answer, _ in kept] == [answer for answer, _ in fresh]
    assert [cost.reused > 0 for _, cost in kept] == [False, *[architecture == "llava"] * 3]
    answerer, conversation = Answerer(model, 2, exact=True), Conversation()
    conversation.ask("What?")
    answerer.answer(conversation, lambda piece: None)
    assert answerer.goes_on is (architecture == "llava")


def test_options_of_one_answer(tmp_path):
    """Its length, and a text that ends it; an answer that is cut is not complete."""
    model = loaded(tmp_path, "llava")
    conversation, answerer = Conversation(), Answerer(model, 30)
    conversation.ask("Tell me")
    text, cost = answerer.answer(conversation, lambda piece: None)
    assert cost.tokens == 30 and not cost.complete
    stop = text[3:5]
    shown: list[str] = []
    short, cost = answerer.answer(conversation, shown.append, options=AnswerOptions(30, stops=(stop,)))
    assert short == text.partition(stop)[0].strip() and "".join(shown).strip() == short
    assert cost.complete and not cost.stopped
    assert answerer.answer(conversation, lambda piece: None, options=AnswerOptions(3))[1].tokens == 3


def test_only_a_cache_that_can_be_cut_is_cut():
    sliding = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=4))
    assert _can_go_on(DynamicCache(), 1) and _can_go_on(ForgettingCache(), 1)
    assert _can_go_on(sliding, 0) and not _can_go_on(sliding, 1)


@pytest.mark.parametrize(
    "saved",
    [
        {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16}, {"min_new_tokens": 20, "max_length": 30},
        {"output_scores": True, "output_attentions": True}, {"do_sample": True, "temperature": 9.0},
        {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"force_words_ids": [[5]]}, {"token_healing": True},
    ],
)  # fmt: skip
def test_saved_settings_of_generate_do_not_break_an_answer(tmp_path, saved):
    model = loaded(tmp_path, "sv-llava")
    expected = talk(model, True, TURNS[:2])
    for name, value in saved.items():
        setattr(model.model.generation_config, name, value)
    found = talk(model, True, TURNS[:2])
    assert [answer for answer, _ in found] == [answer for answer, _ in expected]
    assert [cost.kept for _, cost in found] == [cost.kept for _, cost in expected]


def test_an_error_of_generate_takes_the_question_back_and_keeps_its_traceback(tmp_path, monkeypatch):
    model = loaded(tmp_path, "llava")
    chat = Chat(model, Answerer(model, 2), pictures((40, 20)))
    with monkeypatch.context() as patched:
        patched.setattr(model.model, "generate", lambda **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.take("What?")
    with monkeypatch.context() as patched:
        patched.setattr(model.model, "generate", lambda **options: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        assert chat.take("What?")
    assert chat._conversation.turns == [] and len(chat._conversation.waiting) == 1
    assert chat.take("What?") and len(chat._conversation.turns) == 1


def test_the_cache_of_another_image_is_not_gone_on_with(tmp_path):
    """Its tokens have the same ids."""
    model = loaded(tmp_path, "sv-llava")
    conversation, answerer = Conversation(), Answerer(model, 6)
    for image in pictures((40, 10)), pictures((20, 20)):
        conversation.clear()
        conversation.waiting = image
        conversation.ask("What is this?")
        answer, cost = answerer.answer(conversation, lambda piece: None)
        assert cost.reused == 0
    assert answer == talk(model, False, [("What is this?", pictures((20, 20)))])[0][0]


def test_a_reduction_inside_the_decoder_reads_all_turns_again(tmp_path):
    model = loaded(tmp_path, "llava")
    whole = talk(model, True, TURNS[:2])[1][1]
    model.model.set_reduction(ReductionConfig.parse("fastv:6"))
    cost = talk(model, True, TURNS[:2])[1][1]
    assert whole.reused > 0 and cost.reused == 0 and cost.kept < cost.seen


def test_a_stopped_answer_is_kept_and_the_next_turn_goes_on(tmp_path):
    model = loaded(tmp_path, "sv-llava")
    conversation, answerer = Conversation(), Answerer(model, 40)
    turn = conversation.ask("Tell me")
    asked = iter([False, False, True])
    turn.answer, cost = answerer.answer(conversation, lambda piece: None, lambda: next(asked, True))
    assert cost.tokens == 3 and cost.stopped and str(cost).endswith(", stopped")
    turn = conversation.ask("More?")
    assert answerer.answer(conversation, lambda piece: None)[1].reused > 0


def test_a_conversation_that_is_too_long_says_so(tmp_path):
    model = loaded(tmp_path, "llava", max_position_embeddings=256)
    answered = talk(model, True, [("x", [])], max_new_tokens=1000)
    assert answered[0][1].seen == 255  # the last token of 256 is not put in
    with pytest.raises(UserError, match="the model takes 256: /clear"):
        talk(model, True, [("long " * 60, [])])


def test_an_answer_holds_no_placeholder_of_an_image():
    conversation = Conversation()
    conversation.ask("What?").answer = "an <im<im<image>age>age>!"
    assert conversation.messages()[1]["content"] == "an !"


def test_sampling_follows_the_temperature(tmp_path):
    model = loaded(tmp_path, "llava")
    assert len({talk(model, False, TURNS[:1], temperature=2.0)[0][0] for _ in range(3)}) > 1


def test_what_may_begin_an_end_waits():
    shown: list[str] = []
    text = VisibleText(Ends((), ("###",), ("###", "\n\n")), shown.append)
    seen = []
    for piece in (" A ", "#", "1 is", " #", "#", "#", " more"):
        text.add(piece)
        seen.append("".join(shown))
    assert seen == ["A ", "A ", "A #1 is", "A #1 is ", "A #1 is ", "A #1 is ", "A #1 is "]
    text.add("", last=True)
    assert "".join(shown) == "A #1 is "


@pytest.mark.parametrize(("saved", "used"), [(None, 0), (7, 7)])
def test_sampling_is_from_all_tokens_unless_the_model_says_less(tmp_path, monkeypatch, saved, used):
    model, given = loaded(tmp_path, "llava"), []
    model.model.generation_config.top_k = saved
    generate = model.model.generate
    monkeypatch.setattr(
        model.model, "generate", lambda **options: given.append(options["top_k"]) or generate(**options)
    )
    talk(model, True, [("x", [])], temperature=1.0)
    assert given == [used]
