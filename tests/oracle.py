"""The reference that mmv1 must agree with: transformers, fp32, on the CPU, one conversation at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class OracleAnswer(NamedTuple):
    prompt_token_ids: list[int]  # placeholders expanded
    token_ids: list[int]  # the greedy answer; the end-of-sequence token, if reached, is its last
    logits: torch.Tensor  # [tokens, vocab_size] float32, those each token of the answer was chosen from

    @property
    def first_logits(self) -> torch.Tensor:
        """[vocab_size]: before the first token of the answer."""
        return self.logits[0]


class HFOracle:
    """transformers' model and processor of one directory. Calling it answers a conversation greedily."""

    def __init__(self, model_dir: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(model_dir)
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()

    def inputs(self, conversation: list[dict[str, Any]]) -> Any:
        """The model's inputs: input_ids [1, n], pixel_values [patches, 1176], image_grid_thw [images, 3] ..."""
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    @torch.inference_mode()
    def __call__(
        self, conversation: list[dict[str, Any]], max_new_tokens: int = 8, *, ignore_eos: bool = False
    ) -> OracleAnswer:
        """Answer `conversation`, whose parts are {"type": "text", "text": str} and {"type": "image", "image": PIL image}.

        `ignore_eos` generates exactly `max_new_tokens`, as the sampling parameter of that name does.
        """
        inputs = self.inputs(conversation)
        end = {"eos_token_id": None} if ignore_eos else {}
        output = self.model.generate(
            **inputs, **end, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        prompt = inputs["input_ids"][0].tolist()
        return OracleAnswer(prompt, output.sequences[0, len(prompt):].tolist(), torch.cat(output.logits).float())
