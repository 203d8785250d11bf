"""Chat templates, rendered by jinja2 in its sandbox: a template is a stranger's code."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

_HINT = "pip install emfuse_jax[llm]"


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
    import jinja2

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
    except (jinja2.TemplateError, TypeError) as error:
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

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
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


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
