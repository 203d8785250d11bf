"""Chat at a terminal, or plain continuation where a tokenizer has no chat template."""

import sys
from collections.abc import Callable
from typing import Any

import jax

from experiments import _lm_text
from experiments._lm_decode import Voice, decode_passage, prompt_tokens

Message = dict[str, str]

HELP = "/reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def converse(
    voice: Voice,
    key: jax.Array,
    messages: list[Message],
    *,
    system: str = "",
    colour: bool,
    on_turn: Callable[[list[Message]], None],
) -> None:
    """Reads lines and answers them until the input ends.

    What does not fit into the context is forgotten, the oldest first, and a line says so.

    Args:
        voice: what answers.
        key: of the whole conversation.
        messages: said before; goes on growing.
        system: what a chat template puts before everything.
        colour: whether to colour by expert.
        on_turn: called with all messages after each answer.
    """
    template = has_template(voice.experts.tokenizer)
    if not template:
        print("no chat template: what you type is continued as it is", file=sys.stderr)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            break
        if line.strip() == "/quit":
            break
        if line.strip() == "/reset":
            messages.clear()
            on_turn(messages)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            tokens = fitting_tokens(voice, messages, system, template=template)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        passage = decode_passage(
            voice,
            jax.random.fold_in(key, len(messages)),
            tokens,
            prompt=line,
            painter=_lm_text.Painter(sys.stdout, colour=colour),
            interruptible=True,
        )
        print(flush=True)
        messages.append({"role": "assistant", "content": passage["text"]})
        on_turn(messages)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how to write a conversation down."""
    try:
        tokenizer.chat([{"role": "user", "content": "Hello"}])
    except (ValueError, AttributeError):
        return False
    return True


def fitting_tokens(
    voice: Voice, messages: list[Message], system: str, *, template: bool
) -> list[int]:
    """The conversation's tokens, its oldest turns left out until an answer fits.

    Raises:
        ValueError: if the last message alone is too long.
    """
    room = voice.model.context_length - voice.sampling.max_new_tokens
    first = [{"role": "system", "content": system}] if system else []
    tokens: list[int] = []
    for start in range(0, len(messages), 2):
        tokens = _tokens(voice, [*first, *messages[start:]], template=template)
        if len(tokens) <= room:
            if start:
                print(f"(the first {start} messages are forgotten)", file=sys.stderr)
            return tokens
    raise ValueError(
        f"the message has {len(tokens)} tokens and {voice.sampling.max_new_tokens} may "
        f"follow, but the context holds {voice.model.context_length}; write less, or give "
        "a smaller --sampling.max_new_tokens"
    )


def _tokens(voice: Voice, messages: list[Message], *, template: bool) -> list[int]:
    if not template:
        # Answers continue what was typed, so the text is all of it in a row.
        text = "".join(
            message["content"] + ("\n" if message["role"] == "assistant" else "")
            for message in messages
        )
        return prompt_tokens(voice.experts, text, voice.sampling)
    return list(voice.experts.tokenizer.chat(messages))
