"""A small byte-level BPE tokenizer, trained on the embedded set's own text."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_skip_base.errors import MissingFileError

from .questions import INSTRUCTION, SHORT_INSTRUCTION

VOCAB_SIZE = 1024
MAX_LENGTH = 2048
BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<pad>"
EXTRA_TOKENS = ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<image>"]
# The text of the conversation template; repeated, since it is in every record.
FRAME_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Hello ASSISTANT: Hello",
) * 1000
# Every answer is one token, and the same token in the list of options: an option with its letter ("B: top left"), a
# digit, a cell. A tiny model then answers a multiple choice in one step, and need not learn which letter belongs to
# which text; that takes longer than everything else here. Phrases may become one token, which keeps sequences short.
CELL = r"(?:top|bottom) (?:left|right)"
WORD = r"(?:\p{L}{2,}|\p{Ll})"
PIECES = "|".join(
    (
        r"USER: | ?ASSISTANT:",
        rf"[A-D][.:] (?:{CELL}|{WORD}|\p{{N}})",
        r"[.,:] ",
        CELL,
        rf" ?{WORD}(?: (?!{CELL}|ASSISTANT:){WORD}(?!\p{{L}}))*(?: (?={CELL}|\p{{N}}))?",
        r"\p{L}",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\n+",
        r"\s",
    )
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer; all 256 bytes are in its vocabulary, so any text survives encoding and decoding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, *EXTRA_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    instructions = (INSTRUCTION, SHORT_INSTRUCTION)
    bare = (text.removesuffix(INSTRUCTION).removesuffix(SHORT_INSTRUCTION) for text in (*texts, *FRAME_TEXT))
    backend.train_from_iterator(bare, trainer)
    # These lines end most prompts; as single entries they shorten every training sequence by a fifth.
    backend.add_tokens([AddedToken(instruction, normalized=False) for instruction in instructions])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=EXTRA_TOKENS,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=load_chat_template(),
    )


def load_chat_template() -> str:
    """The chat template of the library's Vicuna conversation format, the shortest one around a turn."""
    template = files("llava_skip") / "templates" / "v1.jinja"
    if not template.is_file():
        raise MissingFileError(f"the chat template {template} is missing: is llava_skip installed completely?")
    return template.read_text(encoding="utf-8")
