"""Language models of a few hundred numbers, and held-out text, as folders."""

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.artifacts.config import write_json
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.model import init_params
from emfuse_jax.llm.tokenizer import ByteTokenizer
from emfuse_jax.llm.weights import save_pretrained
from experiments import _lm

CONFIG = LmConfig(
    vocab_size=257,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    context_length=64,
    tied=True,
)
WORDS = {
    "py": ["def ", "self", "return ", "(x):", " = ", "None", "for i in "],
    "man": [".TH ", "\\fB", "option", "\n.PP\n", "see also ", "file", ".BR "],
}


def write_model(folder, key, config=CONFIG, *, favourite=(), tokenizer=None):
    """A random model that repeats itself, and to which ``favourite`` bytes are likelier."""
    params = init_params(key, config)
    # The first coordinate of the stream is always on, and these tokens have more of it.
    first = (
        jnp.full(config.vocab_size, 0.5).at[jnp.asarray(list(favourite), int)].set(1.5)
    )
    params["embed"] = (15.0 * params["embed"]).at[:, 0].set(first)
    save_pretrained(folder, params, config, tokenizer or ByteTokenizer())
    return params


def write_text(folder, *, domains=("py", "man"), documents=4, window=24, prompt=8):
    """The ``text`` folder that train_lm_experts makes, of bytes."""
    rng = np.random.default_rng(0)
    tokenizer = ByteTokenizer()
    (folder / "windows").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    single = {}
    for domain in domains:
        windows = []
        for number in range(documents):
            text = "".join(rng.choice(WORDS[domain], 60))
            for start in (0, window):
                tokens = tokenizer.encode(text)[start : start + window]
                windows.append(
                    _window((domain,), (f"{domain}/{number}",), (0,), tokens, prompt)
                )
        single[domain] = _lm._with_distractors(windows)
    first, second = (single[domain] for domain in domains)
    half = window // 2
    mixed = [
        _window(
            domains, a.documents + b.documents, (0, half),
            [*a.tokens[:half], *b.tokens[half:]], prompt,
        )
        for a, b in zip(first, second, strict=True)
    ]  # fmt: skip
    for name, windows in (single | {"mixed": mixed}).items():
        rows = [window._asdict() for window in windows]
        _lm._write_lines(folder / "windows" / f"{name}.jsonl", rows)
    np.savez(
        folder / "tokens.npz", **{name: np.zeros(4, np.uint16) for name in domains}
    )
    counts = {name: {} for name in domains}
    write_json(folder / "corpus.json", {"window": window, "counts": counts})
    return folder


def write_run(folder, *, documents=4):
    """What a finished run of train_lm_experts holds that fuse_llm reads."""
    write_text(folder / "text", documents=documents)
    names = ["expert-py", "expert-man", "generalist"]
    for index, name in enumerate(names):
        favourite = "".join(WORDS[["py", "man"][index % 2]]).encode()
        write_model(
            folder / "models" / name, jax.random.key(index), favourite=favourite
        )
    write_json(folder / "config.json", {"kind": "train_lm_experts", "config": {}})
    write_json(folder / "result.json", {"models": dict.fromkeys(names)})
    return folder


def _window(domains, documents, starts, tokens, prompt):
    tokenizer = ByteTokenizer()
    return _lm.Window(
        domains, documents, starts, tuple(map(int, tokens)), prompt,
        tokenizer.decode(tokens[:prompt]), tokenizer.decode(tokens[prompt:]),
    )  # fmt: skip
