"""lm-evaluation-harness on our language models, single or fused.

`harness_model` gives what ``lm_eval.simple_evaluate(model=…)`` takes. Its tasks ask for
three things: the log-likelihood of a continuation (multiple choice), that of a whole
text (perplexity, bits per byte), and text up to a stop string. How fused models behave
when given text is scored is said in `evaluation.language`: EMSelect by the expert that
it chooses at each token, prompt-weighted rules by weights from the context, which in
rolling tasks is a single token. ``is_greedy`` asks for the argmax of the fused law.

Tasks need no network if they name local files: a folder of YAML files with
``dataset_path: json`` and ``dataset_kwargs: {data_files: …}``, and
``TaskManager(include_path=folder, include_defaults=False)``. Give rolling tasks
``doc_to_text: ""``. Trailing spaces of a context are scored with the continuation, as
everywhere in the harness.

References:
    Gao et al., "A framework for few-shot language model evaluation", 2024.
    https://github.com/EleutherAI/lm-evaluation-harness
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax

from emfuse_jax.base import Key, LanguageModel, Params
from emfuse_jax.evaluation.scoring import (
    Request,
    compile_scorer,
    rolling_windows,
    score_continuations,
)
from emfuse_jax.llm.stream import Decoder, compile_decoder, complete
from emfuse_jax.llm.tokenizer import Tokenizer

__all__ = ["harness_model"]

_GENERATION = {
    "until": (),
    "do_sample": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "num_beams": 1,
}
"""What a task may ask of a generation, and our defaults."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness_model(
    params: Params,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    key: Key | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    special: bool = True,
    chunk: int = 16,
    block: int | None = 128,
) -> Any:
    """A language model as lm-evaluation-harness' ``TemplateLM``.

    Contexts that leave no room for what follows lose their beginning, as in the
    harness' own models; a warning says how many did.

    Args:
        params: the model's.
        model: any language model; a fusion of several is one.
        tokenizer: any `llm.tokenizer.Tokenizer` that belongs to the model.
        key: of tasks that sample; `jax.random.key(0)` by default.
        batch_size: rows per compiled call.
        max_new_tokens: where a task does not say.
        special: put before a context what the tokenizer puts before a text: of Llama-3
            the beginning-of-text token, of Qwen nothing.
        chunk: tokens between looks for stop strings.
        block: columns that are scored at once, see `language.token_log_probs`.

    Raises:
        ImportError: if lm_eval is not installed.
        ValueError: if the tokenizer has no end-of-text token.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError(
            "lm-evaluation-harness is not installed; pip install emfuse_jax[llm_eval]"
        ) from error
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_id is None), which stands for "
            "an empty context and ends generations"
        )

    # Built here because the base class is an optional dependency.
    class HarnessLm(_Requests, TemplateLM):
        """`_Requests` under the harness' base class."""

    return HarnessLm(
        params,
        model,
        tokenizer,
        key=jax.random.key(0) if key is None else key,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        special=special,
        chunk=chunk,
        block=block,
    )


class _Requests:
    """The methods that the harness calls. Names and signatures are its own."""

    cache_hook: Any

    def __init__(
        self,
        params: Params,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        key: jax.Array,
        batch_size: int,
        max_new_tokens: int,
        special: bool,
        chunk: int,
        block: int | None,
    ) -> None:
        super().__init__()
        self._params, self._model, self._tokenizer = params, model, tokenizer
        self._key, self.batch_size = key, batch_size
        self._max_new_tokens, self._special, self._chunk = (
            max_new_tokens,
            special,
            chunk,
        )
        self._scorer = compile_scorer(model, block=block)
        self._decoders: dict[tuple[Any, ...], Decoder] = {}
        self.max_length = model.context_length

    @property
    def eot_token_id(self) -> int:
        # `harness_model` has seen that there is one.
        return cast(int, self._tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return type(self._tokenizer).__name__

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        del kwargs
        special = self._special if add_special_tokens is None else add_special_tokens
        tokens = self._tokenizer.encode(string, special=special)
        # Chat templates may have written the beginning of text themselves.
        twice = len(tokens) > 1 and tokens[0] == tokens[1] == self._tokenizer.bos_id
        return tokens[1:] if special and twice else tokens

    def tok_decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        del kwargs
        return self._tokenizer.decode(list(tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not add_generation_prompt:
            raise ValueError(
                "the chat template cannot leave the assistant's turn open: tasks with "
                "gen_prefix or prefilled answers need apply_chat_template=False"
            )
        return self._tokenizer.decode(self._tokenizer.chat(chat_history), special=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        cut = _Cuts(self.max_length + 1)
        pairs = [(cut(context, len(text)), text) for _, context, text in requests]
        cut.warn()
        scores = self._score(pairs, disable_tqdm)
        answers = [(float(s.log_probs.sum()), bool(s.greedy.all())) for s in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        pairs: list[Request] = []
        sizes = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = rolling_windows(tokens, self.prefix_token_id, self.max_length)
            pairs += windows
            sizes.append(len(windows))
        scores = iter(self._score(pairs, disable_tqdm))
        totals = [
            float(sum(next(scores).log_probs.sum() for _ in range(size)))
            for size in sizes
        ]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, pairs: Sequence[Request], disable_tqdm: bool) -> list[Any]:
        from tqdm import tqdm

        with tqdm(total=len(pairs), disable=disable_tqdm, desc="scoring") as bar:
            return score_continuations(
                self._params,
                self._scorer,
                pairs,
                batch_size=self.batch_size,
                on_batch=bar.update,
            )

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[str]:
        from tqdm import tqdm

        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            options = _generation_options(request.args[1], self._max_new_tokens)
            groups.setdefault(options, []).append(index)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for options, members in groups.items():
                contexts = {i: requests[i].args[0] for i in members}
                for index, text in self._generate(contexts, *options):
                    texts[index] = text
                    bar.update()
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generate(
        self,
        contexts: dict[int, str],
        new_tokens: int,
        until: tuple[str, ...],
        *sampling: Any,
    ) -> Iterator[tuple[int, str]]:
        """Completes contexts, the longest first, all with the same options."""
        cut = _Cuts(self.max_length)
        prompts = {i: cut(self._context(x), new_tokens) for i, x in contexts.items()}
        cut.warn()
        order = sorted(prompts, key=lambda i: len(prompts[i]), reverse=True)
        decoder = self._decoder(sampling, self._stop_tokens(until))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            # Copies fill the last batch up: a smaller one would be another program.
            filled = rows + rows[-1:] * (self.batch_size - len(rows))
            completions = complete(
                self._params,
                jax.random.fold_in(self._key, rows[0]),
                decoder,
                self._tokenizer.decode,
                [prompts[i] for i in filled],
                new_tokens,
                stop_strings=until,
            )
            for index, completion in zip(rows, completions, strict=False):
                yield index, completion.text

    def _context(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _stop_tokens(self, until: tuple[str, ...]) -> tuple[int, ...]:
        """The end of text, and stop strings that are special tokens: decoding drops
        their text, so that it could never be found there."""
        found = {self.eot_token_id}
        for tokens in map(self._tokenizer.encode, until):
            if len(tokens) == 1 and not self._tokenizer.decode(tokens):
                found.add(tokens[0])
        return tuple(sorted(found))

    def _decoder(
        self, sampling: tuple[Any, ...], stop_tokens: tuple[int, ...]
    ) -> Decoder:
        if (sampling, stop_tokens) not in self._decoders:
            temperature, top_k, top_p, min_p = sampling
            self._decoders[sampling, stop_tokens] = compile_decoder(
                self._model,
                chunk=self._chunk,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                stop_tokens=stop_tokens,
            )
        return self._decoders[sampling, stop_tokens]


class _Cuts:
    """Cuts contexts from the left to what leaves room, and counts them."""

    def __init__(self, length: int) -> None:
        self._length, self._count = length, 0

    def __call__(self, context: list[int], following: int) -> list[int]:
        room = self._length - following
        if room < 1:
            raise ValueError(
                f"a request is followed by {following} tokens, which leave no room for a "
                f"context in the model's {self._length}; ask for fewer (max_gen_toks), or "
                "score the text in a loglikelihood_rolling task"
            )
        self._count += len(context) > room
        return context[-room:]

    def warn(self) -> None:
        if self._count:
            warnings.warn(
                f"{self._count} contexts exceed the model's {self._length} tokens and "
                "lost their beginning",
                stacklevel=3,
            )


def _generation_options(asked: dict[str, Any], max_new_tokens: int) -> tuple[Any, ...]:
    """``(new tokens, stop strings, temperature, top_k, top_p, min_p)``, hashable."""
    options = dict(asked)
    lengths = [int(options.pop(name)) for name in _LENGTHS if name in options]
    unknown = sorted(set(options) - set(_GENERATION))
    if unknown:
        raise ValueError(
            f"a task asks for the generation options {unknown}; known are "
            f"{sorted([*_GENERATION, *_LENGTHS])}. Take them out of its "
            "generation_kwargs"
        )
    options = _GENERATION | options
    if options["num_beams"] != 1:
        raise ValueError(f"num_beams={options['num_beams']}; there is no beam search")
    until = options["until"] or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    temperature = options["temperature"]
    if temperature is None:
        temperature = 1.0 if options["do_sample"] else 0.0
    if options["do_sample"] is False:
        temperature = 0.0
    return (
        lengths[0] if lengths else max_new_tokens,
        tuple(stop for stop in until if stop),
        float(temperature),
        options["top_k"],
        options["top_p"],
        options["min_p"],
    )
