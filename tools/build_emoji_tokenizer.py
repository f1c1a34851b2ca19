"""Tokenizer of the embedded captions: ``python tools/build_emoji_tokenizer.py FOLDER``.

Byte-level pairs, learned on the English captions of all concepts, so that any other text is written in pieces. The chat
template is that of LLaVA 1.5 without its system sentence.
"""

from __future__ import annotations

import sys

from gmail_lightning.datasets import EmojiDataset

VOCABULARY = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def build(folder: str) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<pad>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    data = EmojiDataset()
    captions = [caption for i in range(len(data)) for caption in data.captions(i)]
    # With a space before it, too: a caption follows a prompt.
    tokenizer.train_from_iterator([*captions, *(f" {caption}" for caption in captions)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    build(sys.argv[1])
