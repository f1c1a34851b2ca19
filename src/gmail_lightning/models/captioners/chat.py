"""Conversations of one question about an image and its answer, as the chat template of a tokenizer lays them out."""

from __future__ import annotations

from typing import Any, NamedTuple

QUESTION, ANSWER = "kaleidoscope", "hippopotamus"  # rendered once, to see where a template puts them


class ChatFormat(NamedTuple):
    """The parts of a conversation of one question and one answer, as strings.

    ``before + question + between`` is the prompt and holds the image placeholder once; ``lead + answer + end`` is what
    the assistant writes.
    """

    before: str
    between: str
    lead: str  # white space before the answer
    end: str  # up to and with the token that ends the answer
    end_id: int  # id of that token

    def prompt(self, question: str) -> str:
        """What the language model is given."""
        return self.before + question + self.between

    def answer(self, answer: str) -> str:
        """What it is to go on with."""
        return self.lead + answer + self.end


def chat_format(tokenizer: Any, image_token: str) -> ChatFormat:
    """Reads the chat template of a tokenizer, whether it takes contents as strings or as lists of parts.

    A template that puts no special token behind the answer, as LLaVA 1.5's, would train a model that never stops: the
    end token of the tokenizer then ends the answer, as in LLaVA's own training.

    Args:
        tokenizer: Of Hugging Face.
        image_token: Placeholder of the image.

    Raises:
        ValueError: If there is no chat template, or it does not show image, question and answer once each, in an order
            in which the answer goes on from the prompt.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, so nothing says what a prompt looks like: set chat_template, in Jinja."
        )
    as_text = f"{image_token}\n{QUESTION}"
    as_parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    reasons = []
    for asked, answered in ((as_text, ANSWER), (as_parts, [{"type": "text", "text": ANSWER}])):
        found = _render(tokenizer, asked, answered, image_token)
        if isinstance(found, ChatFormat):
            return found
        reasons.append(found)
    raise ValueError(
        f"The chat template does not fit: with contents as strings {reasons[0]}; as lists of parts {reasons[1]}. Its "
        f"prompt must hold {image_token!r} and the question once, and the answer must go on from it. Set chat_template."
    )


def _render(tokenizer: Any, asked: Any, answered: Any, image_token: str) -> ChatFormat | str:
    from jinja2.exceptions import TemplateError

    user, assistant = {"role": "user", "content": asked}, {"role": "assistant", "content": answered}
    try:
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    except (TemplateError, TypeError) as error:
        return f"it fails ({error})"
    if prompt.count(image_token) != 1 or prompt.count(QUESTION) != 1:
        return f"the prompt is {prompt!r}"
    if not full.startswith(prompt) or full[len(prompt) :].count(ANSWER) != 1:
        return f"the prompt is {prompt!r} and the conversation {full!r}"
    before, between = prompt.split(QUESTION)
    lead, rest = full[len(prompt) :].split(ANSWER)
    if lead.strip():  # such as an empty thought: given, not learned
        between, lead = between + lead, ""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [token for token in {*tokenizer.all_special_tokens, *added} if token in rest and token != image_token]
    end = min(ends, key=rest.index, default=None)
    if end is None:
        return ChatFormat(before, between, lead, tokenizer.eos_token, tokenizer.eos_token_id)
    return ChatFormat(before, between, lead, rest[: rest.index(end)] + end, tokenizer.convert_tokens_to_ids(end))


class ImageChat:
    """Token ids of conversations about an image.

    Args:
        tokenizer: Of Hugging Face. The image placeholder is added where it has none: a place among the ids, which needs
            no embedding, since the image stands there, and is never written.
        image_token: The placeholder.
        question: Asked where a question is empty.

    Attributes:
        image_id: Id of the placeholder.
        end_id: Id of the token that ends an answer.
    """

    def __init__(self, tokenizer: Any, image_token: str, question: str) -> None:
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([image_token], special_tokens=True)
        self.tokenizer, self.image_token, self.question = tokenizer, image_token, question
        self.image_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.format = chat_format(tokenizer, image_token)
        self.end_id = self.format.end_id
        self.start_ids = _start_ids(tokenizer, self.format.prompt(QUESTION))
        prompt = self.tokens([QUESTION], [ANSWER])[0][0]  # a template that does not fit shows now
        if prompt.count(self.image_id) != 1:
            raise ValueError(
                f"The tokenizer makes no single token of {image_token!r} within a prompt, so that the image has no "
                "place: give a tokenizer that has it as a special token."
            )

    def tokens(self, questions: list[str], captions: list[str] | None) -> list[tuple[list[int], list[int]]]:
        """Token ids of every prompt, and of what follows it: those of the whole less those of the prompt.

        Raises:
            ValueError: If the tokens of a prompt are not the first of the whole, so that no answer is told apart.
        """
        prompts = [self.format.prompt(self._clean(question) or self.question) for question in questions]
        distinct = list(dict.fromkeys(prompts))  # mostly one
        of_prompt = dict(zip(distinct, self.tokenizer(distinct, add_special_tokens=False).input_ids, strict=True))
        if captions is None:
            return [(self.start_ids + of_prompt[prompt], []) for prompt in prompts]
        texts = [p + self.format.answer(self._clean(caption)) for p, caption in zip(prompts, captions, strict=True)]
        whole: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        found = []
        for text, prompt, ids in zip(texts, prompts, whole, strict=True):
            length = len(of_prompt[prompt])
            if ids[:length] != of_prompt[prompt]:
                raise ValueError(
                    f"The tokens of the prompt {prompt!r} are not the first of those of {text!r}: the tokenizer joins "
                    "its end with the answer, and no label would be right. Set a chat_template that keeps them apart."
                )
            found.append((self.start_ids + ids[:length], ids[length:]))
        return found

    def _clean(self, text: str) -> str:
        """One placeholder stands for the image, whatever a text says."""
        return text.replace(self.image_token, " ").strip()


def _start_ids(tokenizer: Any, prompt: str) -> list[int]:
    """What the tokenizer itself begins a text with, unless the template has written it."""
    if tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token):
        return []
    plain: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    usual: list[int] = tokenizer(prompt).input_ids
    start = next((i for i in range(len(usual)) if usual[i : i + len(plain)] == plain), 0)
    return usual[:start]
