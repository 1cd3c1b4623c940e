"""The reference that mmv1 must agree with: transformers, one conversation at a time; float32 on the CPU unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor


class OracleAnswer(NamedTuple):
    prompt_token_ids: list[int]  # placeholders expanded
    token_ids: list[int]  # the greedy answer; the end-of-sequence token, if reached, is its last
    logits: torch.Tensor  # [tokens, vocab_size] float32, those each token of the answer was chosen from

    @property
    def first_logits(self) -> torch.Tensor:
        """[vocab_size]: before the first token of the answer."""
        return self.logits[0]


class HFOracle:
    """transformers' model of one directory, and its processor, which for a model of text alone is its tokenizer. Calling it
    answers a conversation greedily."""

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.processor = AutoProcessor.from_pretrained(model_dir)
        self.sees = hasattr(AutoConfig.from_pretrained(model_dir), "vision_config")
        kind = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        self.model = kind.from_pretrained(model_dir, dtype=dtype).to(device).eval()

    def inputs(self, conversation: list[dict[str, Any]]) -> Any:
        """The model's inputs: input_ids [1, n], pixel_values [patches, 1176], image_grid_thw [images, 3] ... Templates of
        models of text alone know content as one text: its parts, line by line."""
        if not self.sees:
            conversation = [{**turn, "content": "\n".join(part["text"] for part in turn["content"])} for turn in conversation]
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def inputs_within(self, conversation: list[dict[str, Any]], limits: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The same, with each picture's own (min_pixels, max_pixels): the processor, which takes one pair for all pictures of a
        call, is called for each of them, and the parts are put together as it does."""
        images = [part["image"] for turn in conversation for part in turn["content"] if part["type"] == "image"]
        processed = [
            self.processor.image_processor(images=[image], min_pixels=low, max_pixels=high, return_tensors="pt")
            for image, (low, high) in zip(images, limits, strict=True)
        ]
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        pieces = text.split(self.processor.image_token)
        counts = [len(each["pixel_values"]) // self.processor.image_processor.merge_size**2 for each in processed]
        expanded = "".join(
            piece + self.processor.image_token * count for piece, count in zip(pieces, [*counts, 0], strict=True)
        )
        input_ids = self.processor.tokenizer(expanded, return_tensors="pt")["input_ids"]
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.model.config.image_token_id).long(),
            **{name: torch.cat([each[name] for each in processed]) for name in ("pixel_values", "image_grid_thw")},
        }

    @torch.inference_mode()
    def __call__(
        self,
        conversation: list[dict[str, Any]],
        max_new_tokens: int = 8,
        *,
        ignore_eos: bool = False,
        limits: Sequence[tuple[int, int]] | None = None,
    ) -> OracleAnswer:
        """Answer `conversation`, whose parts are {"type": "text", "text": str} and {"type": "image", "image": PIL image}.

        `ignore_eos` generates exactly `max_new_tokens`, as the sampling parameter of that name does. `limits`: see
        `inputs_within`.
        """
        inputs = self.inputs(conversation) if limits is None else self.inputs_within(conversation, limits)
        end = {"eos_token_id": None} if ignore_eos else {}
        on_device = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        output = self.model.generate(
            **on_device, **end, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        prompt = inputs["input_ids"][0].tolist()
        return OracleAnswer(prompt, output.sequences[0, len(prompt):].tolist(), torch.cat(output.logits).float().cpu())
