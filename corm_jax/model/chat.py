"""A user's words as the conversation that a model expects: the checkpoint's own chat template, in Jinja's language."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from corm_jax.errors import CormError

WAY_OUT = "write the prompt out, without --chat"
PATIENCE = 120
"""Seconds after which a template is stopped where the system cannot limit its processor time."""


class ChatTemplate(NamedTuple):
    """What a checkpoint says about conversations.

    Attributes:
      source: the template, or several by name, if there are any.
      tokens: text of special tokens by name, such as ``bos_token``; the template sees them.
      where: the file, for errors.
    """

    source: Any
    tokens: dict[str, str]
    where: str

    def render(self, text: str) -> str:
        """A user's words and the beginning of an answer, as ``apply_chat_template`` of transformers writes them.

        The template is a program from elsewhere. It runs in Jinja's sandbox, in a process whose time and memory are
        limited (`chat_render`). Of several templates it is the one that is called ``default``.

        Raises:
          CormError: without a template, or if it fails.
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
            raise CormError(f"the chat template of {self.where} is no text, but {source!r:.60}: {WAY_OUT}")
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
    # -P: or this folder, which has a types.py, would come before the standard library.
    command = [sys.executable, "-P", str(Path(__file__).with_name("chat_render.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"error": "it takes too long"}
    except OSError as error:
        return {"error": f"there is no process to run it in: {error}"}
    if done.returncode < 0:  # a signal
        return {"error": "it takes too long, or too much memory"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"error": f"its process says {done.stderr.decode(errors='replace')[-200:]!r}"}
