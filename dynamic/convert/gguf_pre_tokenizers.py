"""How byte-level tokenizers of GGUF files cut a text before merging: the rules behind ``tokenizer.ggml.pre``.

A rule is a list of patterns. Each cuts every piece into what it matches and what lies between. Names and patterns are
those of llama.cpp, and where its patterns stand for others, those of the models' own ``tokenizer.json``. Files with
names that are not here (superbpe, chameleon …) are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """A rule.

    Arguments:
        patterns: regular expressions, applied one after the other.
        compose: texts are brought into Unicode's composed form (NFC) first.
        whole_words: a piece that is a token is that token, whatever the merges say.
        add_bos: texts begin with the token for it, where the file does not say.
    """

    patterns: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    add_bos: bool = False


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# DeepSeek's list of letters that have a case.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)


def _words(letters: str, digits: str, symbols: str) -> PreTokenizer:
    """The pattern of GPT-4, in which models differ in a few places."""
    return PreTokenizer(patterns=(f"{letters}|{digits}| ?{symbols}|{_SPACES}",))


def _by_case(
    ending: str, digits: str, upper: str = _UPPER, lower: str = _LOWER, lines: str = r"[\r\n/]*"
) -> PreTokenizer:
    """The pattern of GPT-4o: words end before capital letters."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}"
    return _words(f"{first}|{second}", digits, rf"[^\s\p{{L}}\p{{N}}]+{lines}")


def _but_han(letters: str) -> str:
    """Without Chinese characters."""
    return f"[{letters}&&[^\\p{{Han}}]]"


_LETTERS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SYMBOLS = r"[^\s\p{L}\p{N}]+[\r\n]*"
_ONE_DIGIT = _words(_LETTERS, DIGIT, _SYMBOLS)
_THREE_DIGITS = _words(_LETTERS, r"\p{N}{1,3}", _SYMBOLS)
_PUNCTUATED_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK3 = PreTokenizer(patterns=(r"\p{N}{1,3}", _HAN_KANA, _PUNCTUATED_WORDS))
_CASES = _by_case(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_KIMI = _by_case(f"{_CONTRACTIONS}?", r"\p{N}{1,3}", _but_han(_UPPER), _but_han(_LOWER), r"[\r\n]*")
_PUNCTUATED = PreTokenizer(patterns=(" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",))
_GPT2_RULE, _DIGITS_GPT2 = PreTokenizer(patterns=(GPT2,)), PreTokenizer(patterns=(DIGIT, GPT2))

_RULES: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "jais", "trillion", "exaone4", "granite-docling"): _GPT2_RULE,
    ("mpt", "olmo"): replace(_GPT2_RULE, compose=True),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"): _DIGITS_GPT2,
    ("command-r",): replace(_DIGITS_GPT2, compose=True),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): replace(
        _THREE_DIGITS, whole_words=True, add_bos=True
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): _THREE_DIGITS,
    ("glm4", "glm5"): replace(_THREE_DIGITS, whole_words=True),
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"): replace(_ONE_DIGIT, compose=True),
    ("stablelm2", "hunyuan", "solar-open", "grok-2"): _ONE_DIGIT,
    ("qwen35",): replace(
        _words(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+", DIGIT, r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
        compose=True,
    ),
    ("seed-coder",): _words(_LETTERS, r"\p{N}{1}", r"[^\s\p{L}\p{N}\r\n]+"),
    ("bailingmoe", "bailingmoe2", "llada-moe"): PreTokenizer(
        patterns=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    ("minicpm5",): replace(
        PreTokenizer(patterns=(r"\p{N}{1,3}", *_words(_LETTERS, r"\p{N}+", _SYMBOLS).patterns)), whole_words=True
    ),
    ("tekken",): replace(_by_case("", DIGIT), whole_words=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): _CASES,
    ("tiny_aya", "cohere2moe"): PreTokenizer(patterns=(r"\d{1,3}(?=(?:\d{3})*\b)", *_CASES.patterns)),
    ("kimi-k2",): PreTokenizer(patterns=(rf"\p{{Han}}+|{_KIMI.patterns[0]}",)),
    ("exaone-moe",): PreTokenizer(
        patterns=(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    # Digits in threes, counted from the end of a number.
    ("afmoe",): PreTokenizer(patterns=(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _PUNCTUATED_WORDS)),
    ("deepseek-llm",): PreTokenizer(
        patterns=(
            "[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_HANGUL,
            r"\p{N}+",
        )
    ),
    ("deepseek-coder",): PreTokenizer(patterns=("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, DIGIT)),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): _DEEPSEEK3,
    ("falcon",): PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    ("poro-chat", "bloom", "gpt3-finnish"): _PUNCTUATED,
    ("viking",): PreTokenizer(patterns=(*_PUNCTUATED.patterns, DIGIT)),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: rule for names, rule in _RULES.items() for name in names}
