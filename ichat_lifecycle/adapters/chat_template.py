"""Whether a chat template that was given on the command line can be compiled: without the model."""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError

# Tags of others, such as transformers' {% generation %}: jinja2 alone does not know them.
_FOREIGN_TAG = "unknown tag"


def syntax_error(template: str) -> str | None:
    """What is wrong with the template's syntax, with its line; None where nothing is to be seen."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        environment.parse(template)
    except TemplateSyntaxError as error:
        message = error.message or "not a template"
        return None if _FOREIGN_TAG in message else f"line {error.lineno}: {message}"
    except RecursionError:
        return "too many expressions or blocks within each other"
    return None
