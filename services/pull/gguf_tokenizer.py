"""The tokenizer of a GGUF file, as the files that transformers reads.

Two kinds: byte pairs with merges (`gpt2`, as most models have it), and SentencePiece with scores
(`llama`). How a text is cut up before the merges is named by `tokenizer.ggml.pre`, and is known
here for some models; one that is not known is refused, for a wrong cut gives other tokens in a few
places only, where nobody notices.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as cut

from llmos.kernel.errors import BadInput
from llmos.services.pull.gguf_file import GgufFile

# What a token is, in tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _words() -> Any:
    """As GPT-2 cuts: words with their space, numbers, the rest."""
    return cut.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    return cut.Sequence([cut.Digits(individual_digits=True), _words()])


def _by(pattern: str) -> Any:
    whole = cut.Split(Regex(pattern), behavior="isolated", invert=False)
    return cut.Sequence([whole, cut.ByteLevel(add_prefix_space=False, use_regex=False)])


# By the name of the cut (llama.cpp, src/llama-vocab.cpp).
CUTS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo"), _words),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
                    lambda: _by(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), lambda: _by(_QWEN2)),
}  # fmt: skip

# Those that take a whole word that is a token as it is, whatever the merges would make of it; and
# those that begin a text with the first token unless the file says otherwise.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # NFC before anything else


def write_tokenizer(file: GgufFile, folder: Path) -> list[str]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja -> notes for the user.

    Raises BadInput.
    """
    made, notes = make_tokenizer(file)
    made.save(str(folder / "tokenizer.json"))
    config = json.dumps(_config(file), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n")
    template = file.keys.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(str(template))
    else:
        notes.append("it has no chat template: its prompts are taken as they are")
    return notes


def make_tokenizer(file: GgufFile) -> tuple[Tokenizer, list[str]]:
    """-> the tokenizer, and what its user should know of it. Raises BadInput."""
    kind = str(file.key("tokenizer.ggml.model"))
    notes: list[str] = []
    tokens = [str(token) for token in file.key("tokenizer.ggml.tokens")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise BadInput(f"{file.path.name} has a token twice in its vocabulary")
    try:
        if kind == "gpt2":
            made = _of_merges(file, vocabulary, notes)
        elif kind == "llama":
            made = _of_scores(file, vocabulary, tokens)
        else:
            raise BadInput(
                f"{file.path.name} has a tokenizer of the kind {kind!r}; gpt2 and llama are read",
                "pull the model's safetensors instead",
            )
    except BadInput:
        raise
    except Exception as exc:  # noqa: BLE001  (the Rust side raises a bare Exception)
        raise BadInput(f"{file.path.name} has a broken vocabulary: {exc}") from None
    _add_special(file, made, tokens)
    if _adds_bos(file):
        _begin_with_bos(file, made, tokens)
    return made, notes


def _of_merges(file: GgufFile, vocabulary: dict[str, int], notes: list[str]) -> Tokenizer:
    name = str(file.keys.get("tokenizer.ggml.pre", ""))
    if not name:
        name = "gpt-2"
        notes.append("it does not say how its tokenizer cuts words: cut as GPT-2 does")
    if name not in CUTS:
        raise BadInput(
            f"{file.path.name} cuts its words by {name!r}, which is not known here",
            "pull the model's safetensors instead: they come with a whole tokenizer",
        )
    halves = [str(merge).partition(" ") for merge in file.key("tokenizer.ggml.merges")]
    if not all(right for _, _, right in halves):
        raise BadInput(f"{file.path.name} has a merge that is no pair of tokens")
    merges = [(left, right) for left, _, right in halves]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _WHOLE_WORDS))
    if name in _COMPOSED:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = CUTS[name]()
    made.decoder = decoders.ByteLevel()
    return made


def _of_scores(file: GgufFile, vocabulary: dict[str, int], tokens: list[str]) -> Tokenizer:
    """SentencePiece: the better a token's score, the earlier its halves are joined."""
    scores = file.key("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise BadInput(f"{file.path.name} has {len(scores)} scores for {len(tokens)} tokens")
    types = _types(file, tokens)
    joined = []
    for number, token in enumerate(tokens):
        if types[number] in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                joined.append((-scores[number], vocabulary[left], vocabulary[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(joined)]
    unknown = file.keys.get("tokenizer.ggml.unknown_token_id")
    made = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    prefix = bool(file.keys.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    ]  # fmt: skip
    made.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return made


def _types(file: GgufFile, tokens: list[str]) -> list[int]:
    found = file.keys.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(found) != len(tokens):
        raise BadInput(f"{file.path.name} has {len(found)} kinds for {len(tokens)} tokens")
    return [int(kind) for kind in found]


def _add_special(file: GgufFile, made: Tokenizer, tokens: list[str]) -> None:
    """Tokens that are found in a text as a whole, before it is cut. Control tokens are left out
    when a text is shown."""
    types = _types(file, tokens)
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED):
            continue
        added = AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        made.add_special_tokens([added]) if added.special else made.add_tokens([added])
        if made.token_to_id(token) != number:
            raise BadInput(f"{file.path.name}: token {token!r} is not {number} in the tokenizer")


def _adds_bos(file: GgufFile) -> bool:
    """Whether a text begins with the first token; llama.cpp decides it so where nobody says."""
    name, kind = file.keys.get("tokenizer.ggml.pre"), file.keys.get("tokenizer.ggml.model")
    default = kind == "llama" or name in _WHOLE_WORDS
    return bool(file.keys.get("tokenizer.ggml.add_bos_token", default))


def _begin_with_bos(file: GgufFile, made: Tokenizer, tokens: list[str]) -> None:
    number = file.keys.get("tokenizer.ggml.bos_token_id")
    if number is None:
        return
    bos = tokens[number]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, number)]
    )


def _config(file: GgufFile) -> dict[str, Any]:
    tokens, names = file.key("tokenizer.ggml.tokens"), {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.keys.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            if not 0 <= number < len(tokens):
                raise BadInput(f"{file.path.name}: its {name} token is {number}, beyond the last")
            names[f"{name}_token"] = tokens[number]
    prefix = str(file.key("general.architecture"))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(file.key(f"{prefix}.context_length")),
        **names,
    }
