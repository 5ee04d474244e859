"""Renders a chat template in a process of its own, whose time and memory are limited.

A chat template is a program that comes with a checkpoint. The sandbox of Jinja gives it no access to files, modules and
attributes, but does not limit time and memory: nested loops or ``"x".ljust(10**11)`` could stop the machine. So `chat`
runs this file as a script, and this file imports nothing of corm_jax. The script reads one JSON object, ``{"template",
"variables"}``, from standard input, and writes one, ``{"text"}`` or ``{"error"}``, to standard output.

The environment is that of Hugging Face transformers (``utils/chat_template_utils.py``), so that a template gives the
same text in both.
"""

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

SECONDS = 2
"""The most processor time of a template. Those of real checkpoints take a few milliseconds."""

BYTES = 2**29
"""The most memory of the process."""

CHARACTERS = 2**24
"""The most characters that a template may write."""


def limit() -> None:
    """Limits the processor time and the memory of this process, where the system can do so."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES)):
        with contextlib.suppress(ValueError, OSError):  # there is a lower limit already, or the system has none
            resource.setrlimit(what, (most, most))


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that a template writes.

    >>> render("{% for word in words %}<{{ word | trim }}>{% endfor %}", {"words": [" a", "b"]})
    '<a><b>'
    """
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training. Here only its body is written."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller):
            return caller()

    class PlainDict:
        """``dict`` for templates: it makes dictionaries, and gives no access to the type."""

        def __call__(self, *args, **values):
            return dict(*args, **values)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    class PlainNamespace(Namespace):
        """``namespace`` for templates: names that begin with an underscore are refused."""

        def __init__(*args, **values):
            self, *rest = args
            values = dict(*rest, **values)
            for name in values:
                PlainNamespace._check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            PlainNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(template).render(**variables)


def main() -> None:
    """Reads a template and its variables from standard input, and writes the text or the error to standard output."""
    asked = json.load(sys.stdin)
    limit()
    try:
        text = render(asked["template"], asked["variables"])
        found = {"text": text} if len(text) <= CHARACTERS else {"error": f"it writes {len(text):,} characters"}
    except ModuleNotFoundError as error:
        found = {"error": f"{error.name} is not installed (pip install 'corm-jax[weights]')"}
    except MemoryError:
        found = {"error": f"it needs more than {BYTES // 2**20} MiB of memory"}
    except RecursionError:
        found = {"error": "it is nested too deeply"}
    except Exception as error:  # a foreign program may raise anything
        found = {"error": f"{error}" or type(error).__name__}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
