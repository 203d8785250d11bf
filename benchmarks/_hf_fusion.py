"""Fusing Hugging Face models in a Python loop: what one would write without this package.

Every model keeps its own key-value cache (`DynamicCache`), runs eagerly, and its last
logits become log-probabilities that are averaged in Python: the uniform log-opinion pool
up to its normaliser, which a greedy choice does not need. Needs torch and transformers, so
it is imported only where that is wanted.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()


class Fusion:
    """Greedy decoding from the uniform pool of models, token by token.

    Attributes:
        models: loaded in float32, with transformers' default attention.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]]):
        self.models = [
            AutoModelForCausalLM.from_pretrained(
                pathlib.Path(folder), dtype=torch.float32, local_files_only=True
            ).eval()
            for folder in folders
        ]
        self._prompt = 0

    @torch.inference_mode()
    def prefill(self, tokens: np.ndarray) -> None:
        """Reads prompts of one length, ``[batch, time]``."""
        given = torch.tensor(tokens, dtype=torch.long)
        outputs = [model(input_ids=given, use_cache=True) for model in self.models]
        self._caches = [output.past_key_values for output in outputs]
        self._logits = [output.logits[:, -1].clone() for output in outputs]
        self._prompt = given.shape[1]

    @torch.inference_mode()
    def decode(self, num_tokens: int) -> torch.Tensor:
        """The next tokens after the prompts ``[batch, time]``; may be called again."""
        for cache in self._caches:
            # What an earlier call appended is dropped; slices are views.
            excess = cache.get_seq_length() - self._prompt
            if excess:
                cache.crop(-excess)
        logits, tokens = self._logits, []
        for _ in range(num_tokens):
            pooled = sum(torch.log_softmax(z, dim=-1) for z in logits) / len(logits)
            token = pooled.argmax(dim=-1, keepdim=True)
            tokens.append(token)
            logits = [
                model(input_ids=token, past_key_values=cache, use_cache=True).logits[
                    :, -1
                ]
                for model, cache in zip(self.models, self._caches, strict=True)
            ]
        return torch.cat(tokens, dim=1)
