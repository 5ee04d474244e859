"""A model of the user's own, by ``--model module:function``: the module is imported, and the function is called."""

import re
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, check_decoder
from corm_jax.model.plain_tokenizer import PlainTokenizer
from corm_jax.model.tokenizer import Tokenizer

PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
RETURNS = "(decoder, tokenizer), see docs/adapters.md"


def is_own(model: str) -> bool:
    """Whether ``--model`` names a function in a module: it has that form, and no file has that name."""
    return PLACE.fullmatch(model) is not None and not Path(model).exists()


def load(model: str) -> tuple[Decoder, Tokenizer]:
    """Imports the module, also from the current directory, calls the function, and returns its decoder and tokenizer.

    Raises:
      CormError: names the module that is missing, the attribute that it lacks, the line that failed, or the method that
        the decoder or the tokenizer lacks.
    """
    name, _, attribute = model.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise CormError(
                f"--model {model}: there is no module {error.name!r} in {here}, and none is installed"
            ) from None
        _failed(model, error)
    except Exception as error:
        _failed(model, error)
    if not hasattr(module, attribute):
        raise CormError(
            f"--model {model}: {_file(module)} has no {attribute!r}: name a function that returns {RETURNS}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        what = f"{attribute} in {_file(module)} has the type {type(function).__name__}"
        raise CormError(f"--model {model}: {what}, but it must be a function that returns {RETURNS}")
    try:
        found = function()
    except CormError:
        raise
    except Exception as error:
        _failed(model, error)
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"{attribute}() returned an object of type {type(found).__name__}"
        raise CormError(f"--model {model}: {what}, but it must return {RETURNS}")
    decoder, tokenizer = found
    check_decoder(decoder, f"--model {model}: the decoder")
    for method in ("encode", "decode"):
        if not callable(getattr(tokenizer, method, None)):
            kind = type(tokenizer).__name__
            raise CormError(f"--model {model}: the tokenizer (a {kind}) has no method {method}: see docs/adapters.md")
    return decoder, tokenizer if isinstance(tokenizer, Tokenizer) else PlainTokenizer(tokenizer)


def _file(module: Any) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _failed(model: str, error: Exception) -> NoReturn:
    """Raises an error that shows the line that failed: the innermost one outside of installed packages."""
    if isinstance(error, SyntaxError):
        raise CormError(f"--model {model}: {error.filename}, line {error.lineno}: {error.msg}") from error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not {"site-packages", "importlib"} & set(Path(frame.filename).parts)]
    own = [frame for frame in own if not frame.filename.startswith("<frozen")]
    where = "".join(f"{one.filename}, line {one.lineno}, {one.line!r}: " for one in (own or frames)[-1:])
    raise CormError(f"--model {model}: {where}{type(error).__name__}: {error}") from error
