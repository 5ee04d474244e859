"""Chat templates: a user's text becomes the conversation that a model expects.

The template is a program in the language of Jinja that comes with the checkpoint.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from corm_jax.errors import CormError

WAY_OUT = "write the conversation into the prompt yourself, without --chat"

PATIENCE = 120
"""Seconds after which a template is stopped, on systems that cannot limit its processor time."""


class ChatTemplate(NamedTuple):
    """The chat template of a checkpoint.

    Attributes:
      source: the text of the template, or several templates by name, or None.
      tokens: the text of each special token by its name, such as ``bos_token``; the template can use them.
      where: the name of the file or directory, for errors.
    """

    source: Any
    tokens: dict[str, str]
    where: str

    def render(self, text: str) -> str:
        """A user's turn and the beginning of an answer, as ``apply_chat_template`` of transformers writes them.

        The template is a foreign program. It runs in the sandbox of Jinja, in a process with limited time and memory
        (`chat_render`). If there are several templates, the one with the name ``default`` is used.

        Raises:
          CormError: if there is no template, or if it fails.
        """
        source = self.source
        if isinstance(source, dict) and source:
            if "default" not in source:
                names = ", ".join(sorted(map(str, source)))
                raise CormError(f"{self.where} has chat templates named {names}, but no 'default': {WAY_OUT}")
            source = source["default"]
        if not source:
            raise CormError(f"{self.where} has no chat template: {WAY_OUT}")
        if not isinstance(source, str):
            raise CormError(f"the chat template of {self.where} must be text, not {source!r:.60}: {WAY_OUT}")
        variables = {
            **self.tokens,
            "messages": [{"role": "user", "content": text}],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        found = _run({"template": source, "variables": variables})
        if "error" in found:
            reason = " ".join(found["error"].split())
            raise CormError(f"the chat template of {self.where} fails: {reason}: {WAY_OUT}")
        return found["text"]


NO_TEMPLATE = ChatTemplate(None, {}, "the tokenizer")


def _run(asked: dict[str, Any]) -> dict[str, str]:
    # Without -P Python would look for modules in this folder first, before the standard library.
    command = [sys.executable, "-P", str(Path(__file__).with_name("chat_render.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"error": "it takes too long"}
    except OSError as error:
        return {"error": f"the process for it cannot be started: {error}"}
    if done.returncode < 0:  # a signal ended the process
        return {"error": "it takes too long, or needs too much memory"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"error": f"its process ended with {done.stderr.decode(errors='replace')[-200:]!r}"}
