"""Kimi's tokenizer from its tiktoken file, or from a tokenizer.json where there is one."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from modes_cli import files

SETTINGS_LIMIT = 256 << 20  # bytes
# How text is cut before merging: Han characters apart, words with the case changes inside, up to three digits, the rest.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class KimiTokenConverter(TikTokenConverter):
    """transformers' converter, with a reader that needs no further package."""

    def __init__(self, path: Path) -> None:
        super().__init__(vocab_file=str(path), pattern=PATTERN)

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Tokens and their ranks, which are their ids: a line is base64, a space, a number.

        Raises:
            ValueError: a line is not; the ranks are not 0, 1, 2, ...
        """
        path = Path(tiktoken_url)
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(files.read_text(path, SETTINGS_LIMIT).splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"`{path.name}`, line `{number}`: not a token in base64 and its rank") from error
        if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
            raise ValueError(f"`{path.name}`: the ranks of its `{len(ranks)}` tokens are not 0, 1, 2, ...")
        return ranks


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json."""
    found: dict[str, Any] = json.loads(files.read_text(folder / "tokenizer_config.json", SETTINGS_LIMIT))
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder. Its special tokens are all that tokenizer_config.json marks as special.

    Raises:
        ValueError, OSError: a file is absent or damaged; a special token is not in the vocabulary.
    """
    settings = tokenizer_settings(folder)
    added = {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
    if (path := folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_str(files.read_text(path, SETTINGS_LIMIT))
    elif (path := folder / "tiktoken.model").is_file():
        tokenizer = KimiTokenConverter(path).converted()
        _add(tokenizer, added)
    else:
        raise ValueError("it has neither tokenizer.json nor tiktoken.model")
    named = {name: _content(settings[name]) for name in _NAMED if settings.get(name) is not None}
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    special = [token["content"] for token in added.values() if token.get("special", True)]
    extra = list(dict.fromkeys([*special, *map(_content, listed)]))
    for token in (*named.values(), *extra):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"special token `{token}` is not in the vocabulary")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[token for token in extra if token not in named.values()],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _add(tokenizer: Tokenizer, added: dict[int, dict[str, Any]]) -> None:
    """Give every id from the last rank to the last named token a token, as the checkpoints' own code does."""
    first = tokenizer.get_vocab_size()
    for id in range(first, max(added, default=first - 1) + 1):
        token = added.get(id, {"content": f"<|reserved_token_{id}|>"})
        special = bool(token.get("special", True))
        entry = AddedToken(token["content"], normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([entry])
        if tokenizer.token_to_id(token["content"]) != id:
            raise ValueError(f"token `{token['content']}` should have id `{id}`: it is twice in the vocabulary")


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
