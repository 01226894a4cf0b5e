"""A byte-level BPE tokenizer of our own, built as GPT-2's is.

The 256 bytes are tokens, so any text can be written with it and comes back exactly; nothing is normalised,
no space is put in front. The same documents give the same bytes on every machine, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_TEXT


def train(texts: Iterator[list[str]], vocabulary_size: int, min_frequency: int) -> PreTrainedTokenizerBase:
    """Train on batches of texts; END_OF_TEXT is the only special token: begin, end and unknown.

    The vocabulary is smaller than asked where the texts have too few pairs that repeat `min_frequency` times.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # it would eat spaces before punctuation when decoding
    )
