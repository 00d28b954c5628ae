"""Text to token ids: CLIP's byte pairs, or the vocabulary that lies in a model's folder."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from pathlib import Path
from typing import Any, Protocol

from .errors import InputError, MissingDependency

START = "<|startoftext|>"
END = "<|endoftext|>"
"""Names of the two control tokens in CLIP's vocabulary files."""

_CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_COMPATIBILITY = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\u3000\uff01-\uffef]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_QUOTES = str.maketrans(
    {**dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("“”„‟", '"')}
)


class Tokenizer(Protocol):
    """What :class:`~.text.TextEncoder` needs of a tokenizer."""

    bos_id: int
    eos_id: int
    pad_id: int
    size: int
    """Ids are 0 to ``size`` - 1."""

    def encode(self, text: str) -> list[int]:
        """Ids of cleaned text (see :func:`clean_text`), without start, end and padding."""


class ClipTokenizer:
    """CLIP's byte-pair encoding, its merges taken from the package ``instant-clip-tokenizer``.

    Control tokens cannot be written in a prompt: their names are ordinary text.
    """

    pad_id = 0

    def __init__(self) -> None:
        """Raises :class:`~.errors.MissingDependency` without that package."""
        try:
            from instant_clip_tokenizer import Tokenizer as InstantTokenizer
        except ImportError as error:
            raise MissingDependency(
                "CLIP's vocabulary is not here: this checkpoint brings no tokenizer, and the package that "
                f"holds CLIP's merges cannot be imported ({error}). Install it with `pip install "
                "instant-clip-tokenizer` (it has wheels for Python up to 3.12), or use a diffusers-format "
                "folder, which brings a tokenizer"
            ) from error
        self._pairs = InstantTokenizer()
        self.bos_id = self._pairs.start_of_text()
        self.eos_id = self._pairs.end_of_text()
        self.size = self.eos_id + 1

    def encode(self, text: str) -> list[int]:
        return self._pairs.encode(text)


class FolderTokenizer:
    """The tokenizer in a model's folder: ``tokenizer.json``, or CLIP's ``vocab.json`` and ``merges.txt``.

    The control tokens are those that ``tokenizer_config.json`` names, or CLIP's; padding is 0 by default.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises :class:`~.errors.InputError` if the files are missing, malformed or lack control tokens."""
        self.folder = Path(folder)
        self._pipeline = _read_pipeline(self.folder)
        self.size = 1 + max(self._pipeline.get_vocab().values(), default=-1)
        named = _named_tokens(self.folder / "tokenizer_config.json")
        self.bos_id = self._id(named.get("bos_token", START))
        self.eos_id = self._id(named.get("eos_token", END))
        self.pad_id = self._id(named["pad_token"]) if "pad_token" in named else 0

    def encode(self, text: str) -> list[int]:
        try:
            return self._pipeline.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception, e.g. for a vocabulary without [UNK]
            raise InputError(f"the tokenizer in {self.folder} cannot encode {text!r}: {error}") from error

    def _id(self, token: str) -> int:
        found = self._pipeline.token_to_id(token)
        if found is None:
            raise InputError(f"the vocabulary in {self.folder} has no token {token!r}, which its texts need")
        return found


def clean_text(text: str) -> str:
    """Text as CLIP's tokenizer reads it: repaired, unescaped, in lower case, with single spaces.

    As open_clip's cleaning (ftfy, ``html.unescape`` twice, white space, lower case), with ftfy's rules
    written out: ligatures and full-width letters to plain ones, curly quotes to straight, no control
    characters, NFC. Only its repair of wrongly decoded text ("Ã©") is left out: it guesses.

    >>> clean_text("  A  bulldog&#39;s “Hat” ")
    'a bulldog\\'s "hat"'
    """
    # ftfy takes text with tags for HTML, whose entities stay until the repair is done.
    text = text if "<" in text else html.unescape(text)
    text = _COMPATIBILITY.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text).translate(_QUOTES)
    # Half a surrogate pair (a command line that is not UTF-8 gives such) cannot be encoded at all.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _read_pipeline(folder: Path) -> Any:
    import tokenizers

    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            pipeline = tokenizers.Tokenizer.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            pipeline = _byte_pairs(vocabulary, merges)
        else:
            raise InputError(f"{folder} holds no tokenizer.json, and not both vocab.json and merges.txt")
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception for malformed files
        raise InputError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    # Cutting and padding are the encoder's, which puts the end token between the two.
    pipeline.no_padding()
    pipeline.no_truncation()
    return pipeline


def _byte_pairs(vocabulary: Path, merges: Path) -> Any:
    """CLIP's pipeline for cleaned text: split into words, digits and signs; bytes as letters; merge."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    pipeline = Tokenizer(
        models.BPE.from_file(
            str(vocabulary), str(merges), end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return pipeline


def _named_tokens(path: Path) -> dict[str, str]:
    """The control tokens that a ``tokenizer_config.json`` names, as plain strings; none without a file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tokens = {
            key: config[key] for key in ("bos_token", "eos_token", "pad_token") if config.get(key) is not None
        }
        return {key: token if isinstance(token, str) else token["content"] for key, token in tokens.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error!r}") from error
