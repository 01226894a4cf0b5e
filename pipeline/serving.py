"""How the registered model answers: shipped beside its weights, so it stands alone and imports nothing of ours.

`mlflow models serve` and `mlflow.pyfunc.load_model` call `_load_pyfunc`. A prompt of any length is answered: the model
has `positions` places for prompt and answer together, so a longer prompt loses its beginning, and an answer ends where
the places do. Neither is an error; the stock text-generation server fails on both with an IndexError.
"""

from collections.abc import Iterable, Mapping
from typing import Any

DEFAULTS = {"max_new_tokens": 60, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "do_sample": True}
UNLIMITED = 2**31  # positions of a model that has no table of them


def fit(num_prompt_tokens: int, max_new_tokens: int, positions: int) -> tuple[int, int]:
    """How many of the prompt's last tokens to keep, and how many new ones to allow, so that both fit.

    The prompt keeps at least half of the places it asks for them, however long an answer is wanted.
    """
    wanted = max(0, max_new_tokens)
    kept = min(num_prompt_tokens, max(positions - wanted, positions // 2, 1))
    return kept, min(wanted, positions - kept)


class Continuation:
    """Continues prompts: the prediction function that MLflow wraps."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        safe = {"local_files_only": True, "trust_remote_code": False}
        self.model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe).eval()
        # A pretrained model may bring its own idea of sampling; the request decides alone.
        self.model.generation_config = GenerationConfig()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        self.positions = getattr(self.model.config, "max_position_embeddings", None) or UNLIMITED
        self.end_id = self.tokenizer.eos_token_id
        # What a document's first token was predicted from in training; an empty prompt starts from it too.
        self.start_id = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end_id

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Each prompt with its continuation.

        Args:
            model_input: a string, strings, or a table whose first column holds strings.
            params: see `DEFAULTS`; what is missing is taken from there. A temperature of 0 means greedy.
        """
        options = DEFAULTS | dict(params or {})
        return [self._answer(prompt, options) for prompt in _prompts(model_input)]

    def _answer(self, prompt: str, options: Mapping[str, Any]) -> str:
        import torch

        # split_special_tokens: "<|endoftext|>" in a prompt is text, as it was in training.
        encoded = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = [self.start_id, *encoded["input_ids"]]
        kept, num_new = fit(len(ids), options["max_new_tokens"], self.positions)
        if num_new == 0:
            return prompt
        tokens_BT = torch.tensor([ids[-kept:]], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if options["do_sample"] and options["temperature"] > 0:
            sampling = {key: options[key] for key in sampling}
        with torch.inference_mode():
            answer_BT = self.model.generate(
                tokens_BT,
                attention_mask=torch.ones_like(tokens_BT),
                max_new_tokens=num_new,
                pad_token_id=self.end_id,
                eos_token_id=self.end_id,
                **sampling,
            )
        return prompt + str(self.tokenizer.decode(answer_BT[0, kept:], skip_special_tokens=True))


def _prompts(model_input: Any) -> Iterable[str]:
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "iloc"):  # a pandas table: what MLflow makes of most requests
        model_input = model_input.iloc[:, 0]
    return [str(prompt) for prompt in model_input]


def _load_pyfunc(path: str) -> Continuation:
    """What MLflow calls to load the model; `path` is the copy of the model's folder."""
    return Continuation(path)
