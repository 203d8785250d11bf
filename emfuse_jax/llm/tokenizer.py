"""Tokenizers: bytes without any dependency, and Hugging Face's ``tokenizer.json``.

Both speak the `Tokenizer` protocol and write folders that transformers reads. Tokens are
named in the alphabet of byte-level tokenizers (Radford et al. 2019), which gives every byte
a printable letter: the byte tokenizer and a byte-level BPE can be aligned by name.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from emfuse_jax.llm._chat import render_chat
from emfuse_jax.llm._files import read_object, replace_file, write_object

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_SPECIAL = ("bos", "eos", "pad", "unk")
END_OF_TEXT = "<|endoftext|>"
_MAX_GAP = 100_000  # ids without a token

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with ``role`` and ``content``."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back.

    Ids of special tokens are None where there are none; ``vocab_size`` is one more than
    the highest id. ``encode(text, *, special=False)`` gives the text's tokens alone, or
    with what the tokenizer puts around a text (a beginning-of-text token, mostly).
    ``decode(ids, *, special=False)`` leaves special tokens out unless asked for them, and
    gives U+FFFD for bytes that are not UTF-8. ``vocab()`` names every token, by id.
    ``chat(messages, *, add_generation_prompt=True)`` is the conversation in the model's own
    format, opened for the assistant's answer. ``save(folder)`` writes what `load_tokenizer`
    and transformers read.
    """

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, special: bool = False) -> str: ...
    def vocab(self) -> list[str]: ...
    def chat(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> list[int]: ...
    def save(self, folder: str | os.PathLike[str]) -> None: ...


class ByteTokenizer:
    """One token per byte of UTF-8, and one that begins, ends and pads texts.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("hé", special=True)
        [256, 104, 195, 169]
        >>> tokenizer.decode([104, 195, 169, 256]), tokenizer.decode([104, 195])
        ('hé', 'h�')
        >>> tokenizer.vocab()[32], tokenizer.vocab_size
        ('Ġ', 257)
    """

    bos_id = eos_id = pad_id = 256
    vocab_size = 257

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The text's bytes; ``special`` puts the end-of-text token before them."""
        return [self.bos_id] * special + list(text.encode())

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Ids past the last token, which padded models have, are left out."""
        end = END_OF_TEXT.encode() if special else b""
        parts = [bytes([i]) if i < 256 else end * (i == 256) for i in ids]
        return b"".join(parts).decode(errors="replace")

    def vocab(self) -> list[str]:
        """Printable names, as byte-level BPE has them."""
        return [*_byte_letters(), END_OF_TEXT]

    def chat(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Refused: bytes have no chat format."""
        raise ValueError(
            "the byte tokenizer has no chat template; encode a text, or load a tokenizer "
            "that has one"
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """As a byte-level BPE without merges, which is the same thing."""
        path = pathlib.Path(folder)
        write_object(path / _FILE, _byte_level(self.vocab()))
        special = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")}
        write_object(path / _CONFIG, _PLAIN | special)


class HfTokenizer:
    """A ``tokenizer.json`` with what its folder says about it."""

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any]) -> None:
        """See `load_tokenizer`.

        Args:
            tokenizer: a ``tokenizers.Tokenizer``.
            settings: of ``tokenizer_config.json``, with the chat template.

        Raises:
            ValueError: if a special token is not in the vocabulary.
        """
        # A file may cut or fill texts to some length; how long they are is our affair.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._settings = tokenizer, dict(settings)
        self._names = {}
        for name in _SPECIAL:
            token = settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if not (token is None or isinstance(token, str)):
                raise ValueError(f"{name}_token={token!r}; expected a string")
            if token is not None:
                self._names[f"{name}_token"] = token
        ids = {
            name: tokenizer.token_to_id(token) for name, token in self._names.items()
        }
        for name, number in ids.items():
            if number is None:
                raise ValueError(
                    f"{name}={self._names[name]!r} is not in the vocabulary; correct "
                    f"{_CONFIG} or add the token to {_FILE}"
                )
        self.bos_id, self.eos_id, self.pad_id = map(
            ids.get, ("bos_token", "eos_token", "pad_token")
        )
        by_name = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(by_name.values(), default=-1) + 1
        if self.vocab_size > 2 * len(by_name) + _MAX_GAP:
            raise ValueError(
                f"the highest id is {self.vocab_size - 1}, but there are "
                f"{len(by_name)} tokens; {_FILE} is damaged"
            )
        # The dict is not in the order of ids, and ids may have gaps.
        self._vocab = [f"<|unused_{i}|>" for i in range(self.vocab_size)]
        for token, number in by_name.items():
            self._vocab[number] = token

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Special tokens spelt out in the text become those tokens, as in transformers."""
        with _told_as_ours():
            return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Ids past the last token, which padded models have, are left out."""
        known = [int(i) for i in ids if i < self.vocab_size]
        with _told_as_ours():
            return self._tokenizer.decode(known, skip_special_tokens=not special)

    def vocab(self) -> list[str]:
        """The names of tokens, by id."""
        return list(self._vocab)

    def chat(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The conversation's tokens.

        Raises:
            ValueError: without a template, or if the template refuses the messages.
        """
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [entry for entry in template if isinstance(entry, Mapping)]
            texts = {str(entry.get("name")): entry.get("template") for entry in named}
            template = texts.get("default")
        if not isinstance(template, str):
            raise ValueError(
                f"this tokenizer has no chat template; put {_TEMPLATE} into its folder, or "
                "encode a text"
            )
        text = render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._names,
        )
        return self.encode(text)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer, its settings and its template."""
        path = pathlib.Path(folder)
        text = self._tokenizer.to_str(pretty=True)
        replace_file(path / _FILE, [text.encode()])
        write_object(path / _CONFIG, _PLAIN | self._settings)


_PLAIN = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
}


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        FileNotFoundError: if there is no ``tokenizer.json``.
        ImportError: if it needs the package ``tokenizers``, and that is not installed.
        ValueError: if a file is damaged.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> ByteTokenizer().save(folder)
        >>> load_tokenizer(folder).decode([72, 105])
        'Hi'
    """
    folder = pathlib.Path(folder)
    path = folder / _FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; other formats are converted by transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    if read_object(path) == _byte_level(ByteTokenizer().vocab()):
        return ByteTokenizer()
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package tokenizers: pip install emfuse_jax[llm]"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:  # the package raises bare Exceptions, and panics
        _reraise_ours(error)
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    try:
        return HfTokenizer(tokenizer, _settings(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def find_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """`load_tokenizer`, or None where the folder has none.

    Example:
        >>> import tempfile
        >>> find_tokenizer(tempfile.mkdtemp()) is None
        True
    """
    found = (pathlib.Path(folder) / _FILE).is_file()
    return load_tokenizer(folder) if found else None


@contextlib.contextmanager
def _told_as_ours() -> Iterator[None]:
    """A tokenizer that loads may still be one that cannot work."""
    try:
        yield
    except BaseException as error:
        _reraise_ours(error)
        raise ValueError(f"the tokenizer cannot do this: {error}") from error


def _reraise_ours(error: BaseException) -> None:
    """Raises what is not the package's: its panics are no Exceptions."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return
    raise error


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """What the files around ``tokenizer.json`` say, the newer ones first."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        if (folder / name).is_file():
            settings |= read_object(folder / name)
    if (folder / _TEMPLATE).is_file():
        settings["chat_template"] = (folder / _TEMPLATE).read_text(encoding="utf-8")
    return settings


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where printable, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _byte_level(vocab: Sequence[str]) -> dict[str, Any]:
    """The ``tokenizer.json`` of bytes; the last token is special."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    end = {"SpecialToken": {"id": vocab[-1], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    around = {
        "type": "TemplateProcessing",
        "single": [end, first],
        "pair": [end, first, second],
        "special_tokens": {
            vocab[-1]: {
                "id": vocab[-1],
                "ids": [len(vocab) - 1],
                "tokens": [vocab[-1]],
            }
        },
    }
    added = {
        "id": len(vocab) - 1,
        "content": vocab[-1],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(vocab)},
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": around,
        "decoder": byte_level,
        "model": model,
    }
