"""Chat templates, rendered by jinja2 in its sandbox: a template is a stranger's code."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

_HINT = "pip install emfuse_jax[llm]"
_MAX_LENGTH = 10**6
"""Letters, items and digits of what one operator of a template makes."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """The conversation as text, as transformers' ``apply_chat_template`` renders it.

    Raises:
        ImportError: without jinja2.
        ValueError: if the messages are not plain data, or the template refuses them.
    """
    environment = _environment()
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {message!r}; expected a dict with a role and a content"
            )
    try:
        # Through JSON: the template is to see data, not objects with methods.
        plain = json.loads(json.dumps([dict(message) for message in messages]))
        return environment.from_string(template).render(
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # a stranger's code may raise anything
        raise ValueError(f"the chat template cannot render this: {error}") from error


@functools.cache
def _environment() -> Any:
    """What templates are written against: transformers' settings, filters and globals."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(f"chat templates need jinja2: {_HINT}") from error

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's text, which matters to training only."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Its operators make nothing that would fill the memory."""

        intercepted_binops = frozenset({"*", "**", "+"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _length(operator, left, right) > _MAX_LENGTH:
                raise jinja2.exceptions.SecurityError(
                    f"too long a result of {operator!r}"
                )
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment


def _length(operator: str, left: Any, right: Any) -> int:
    """How long the result is at the most: a sequence's length, a number's bits."""
    sizes = [
        len(x) if isinstance(x, str | list | tuple) else None for x in (left, right)
    ]
    if operator == "+" or sizes == [None, None]:
        bits = [abs(x).bit_length() if isinstance(x, int) else 0 for x in (left, right)]
        if operator == "**" and isinstance(right, int):
            return bits[0] * abs(right)
        return sum(size or 0 for size in sizes) + sum(bits)
    times = right if sizes[1] is None else left
    return (sizes[0] or sizes[1] or 0) * (times if isinstance(times, int) else 0)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
