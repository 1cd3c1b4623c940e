"""Trains the demo model from nothing to its shipped weights: one command, a few minutes of one GPU.

    python -m demo_model.train OUT [--steps 33000]

OUT becomes a complete model directory, with training_log.json beside the weights. The class is transformers' own; only the way
through it is shorter: pictures and conversations of a batch lie end to end and attention is told where each begins.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from demo_model.data import CATEGORIES, draw_example, held_out_questions
from demo_model.model import make_model, write_files
from demo_model.packing import MAX_PICTURE, MAX_TEXT, MAX_WINDOW, PATCH, Encoder, Pack, Sizes, packs

ATTENTION = "flash_packed"  # the word "flash" makes transformers hand over the boundaries instead of looping over them
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EVALUATED = 960  # held-out questions looked at during training
LEARNING_RATE, WEIGHT_DECAY, WARMUP, CLIP = 1.5e-3, 0.05, 400, 1.0
EAGER_STEPS = 6  # before the step is recorded as a graph
KEPT_PACKS, REPEATS = 1024, 4  # packs of about 18 MB stay on the GPU: of four steps one is about a new one, three about these


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
    cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside the parts that `cu_seq_lens_q` bounds: [1, heads, tokens, width] in, [1, tokens, heads, width] out."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if module.is_causal else (-1, -1)
        attended = varlen_attn(
            query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window
        )
        return attended[None], None
    lengths = [length for length in cu_seq_lens_q.diff().tolist() if length]
    parts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    attended = torch.cat([
        F.scaled_dot_product_attention(*part, is_causal=module.is_causal, scale=scaling) for part in parts
    ], dim=1)
    return attended.transpose(0, 1)[None], None


def use_packed_attention(model: Any) -> None:
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation_internal = ATTENTION


def answer_logits(model: Any, pack: Pack) -> Tensor:
    """float32 [answers, vocabulary]: what the model would say at each place of an answer, given all before it."""
    visual, language = model.model.visual, model.model.language_model
    kernel = visual.patch_embed.proj.weight  # [width, 3, 2, 14, 14]; both frames are the same picture
    mean, std = _pixel_scale(kernel.device)
    pixels = (pack.patches / 255.0 - mean) / std
    hidden = pixels.to(kernel.dtype) @ kernel.sum(dim=2).flatten(1).T
    positions = visual.rotary_pos_emb(hidden, pack.patch_positions.T)
    for number, block in enumerate(visual.blocks):
        whole = number in visual.fullatt_block_indexes
        hidden = block(
            hidden, cu_seqlens=pack.cu_pictures if whole else pack.cu_windows, position_embeddings=positions,
            max_seqlen=MAX_PICTURE if whole else MAX_WINDOW,
        )
    vocabulary = torch.arange(model.config.text_config.vocab_size, device=kernel.device)
    chosen = (pack.tokens[:, None] == vocabulary).to(kernel.dtype)  # a product has a cheaper gradient than a look-up
    words = chosen @ language.embed_tokens.weight
    hidden = words.index_copy(0, pack.destinations.long(), visual.merger(hidden))[None]
    positions = language.rotary_emb(hidden, pack.positions[:, None])
    for layer in language.layers:
        hidden = layer(hidden, position_embeddings=positions, cu_seq_lens_q=pack.cu_texts, max_length_q=MAX_TEXT)
    return model.lm_head(language.norm(hidden)[0].index_select(0, pack.answer_places)).float()


@lru_cache(maxsize=1)
def _pixel_scale(device: torch.device) -> Tensor:
    """float32 [2, 588]: mean and standard deviation for each number of a patch."""
    return torch.tensor([MEAN, STD], device=device).repeat_interleave(PATCH**2, dim=1)


class TrainingPacks(IterableDataset[Pack]):
    """Packs without end; worker w of n makes the examples w, w + n, w + 2 n ..."""

    def __init__(self, model_dir: Path, seed: int, sizes: Sizes) -> None:
        self.model_dir, self.seed, self.sizes = model_dir, seed, sizes

    def __iter__(self) -> Iterator[Pack]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        encoder = Encoder(self.model_dir)
        return packs((encoder.encode(draw_example(self.seed, index)) for index in count(first, step)), self.sizes)


class Trainer:
    """bf16 weights for the passes, their float32 masters for AdamW: what is saved is what the passes saw.

    On a GPU the first steps run as they are; then one is recorded as a CUDA graph, which the others replay.
    """

    def __init__(self, model: Any, device: str, steps: int) -> None:
        self.model, self.steps, self.step = model.to(device), steps, 0
        self.weights = list(model.parameters())
        self.masters = [weight.detach().clone() for weight in self.weights]
        for weight in self.weights:  # and nothing else: the rotary frequencies stay float32, as they are when it is served
            weight.data = weight.data.bfloat16()
        decayed = [master for master in self.masters if master.dim() > 1]
        plain = [master for master in self.masters if master.dim() <= 1]
        self.on_gpu = device == "cuda"
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
            lr=self.rate, betas=(0.9, 0.98), fused=True, capturable=self.on_gpu,
        )
        self.graph: torch.cuda.CUDAGraph | None = None

    def train(self, pack: Pack) -> Tensor:
        """One step; the mean loss of the answers' tokens."""
        warm = min(1.0, (self.step + 1) / WARMUP)
        self.rate.fill_(LEARNING_RATE * warm * (1 + math.cos(math.pi * self.step / self.steps)) / 2)
        self.step += 1
        if not self.on_gpu or self.step <= EAGER_STEPS:
            return self._passes(pack)
        if self.graph is None:
            self.graph, self.pack = torch.cuda.CUDAGraph(), Pack(*(tensor.clone() for tensor in pack))
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # the loader pins memory meanwhile
                self.loss = self._passes(self.pack)
        for own, new in zip(self.pack, pack, strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()

    def _passes(self, pack: Pack) -> Tensor:
        loss = F.cross_entropy(answer_logits(self.model, pack), pack.answer_tokens, ignore_index=-100)
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


@torch.no_grad()
def exact_turns(model: Any, pack: Pack) -> list[bool]:
    """For each turn with an answer: whether the likeliest token is the right one all along, which is what greedy decoding
    needs to give the answer exactly."""
    learnt = pack.answer_tokens >= 0
    right = (answer_logits(model, pack).argmax(-1) == pack.answer_tokens)[learnt]
    turns = pack.answer_turns[learnt]
    wrong = torch.zeros(int(turns.max()) + 1, device=turns.device).index_add_(0, turns, (~right).float())
    return (wrong == 0).tolist()


def accuracy(model: Any, examples: list[Any], held_out_packs: list[Pack]) -> dict[str, float]:
    """Exact answers in percent, over all and by category."""
    exact = [right for pack in held_out_packs for right in exact_turns(model, pack)]
    by_category: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for example, right in zip(examples, exact, strict=True):
        by_category[example.turns[-1].category].append(right)
    shares = {"all": exact, **by_category}
    return {name: round(100 * sum(rights) / max(1, len(rights)), 1) for name, rights in shares.items()}


def to_device(pack: Pack, device: str) -> Pack:
    return Pack(*(tensor.to(device, non_blocking=True) for tensor in pack))


def save(model: Any, out: Path) -> None:
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation_internal = None
    model.save_pretrained(out)
    use_packed_attention(model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=33000)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=int, default=1500, help="steps between looks at held-out questions")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(write_files(arguments.out))
    use_packed_attention(model)
    sizes = Sizes()
    loader = DataLoader(
        TrainingPacks(arguments.out, arguments.seed, sizes), batch_size=None, num_workers=arguments.workers, prefetch_factor=4,
        pin_memory=device == "cuda",
    )
    batches = iter(loader)  # the workers begin now
    encoder = Encoder(arguments.out)
    questions = held_out_questions(EVALUATED)
    looked_at = [
        to_device(pack, device) for pack in packs((encoder.encode(each, last_turn_only=True) for each in questions), sizes)
    ]
    trainer = Trainer(model, device, arguments.steps)
    if device == "cuda":
        for block in (*model.model.visual.blocks, *model.model.language_model.layers):
            block.compile()
    log: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
        "parameters": sum(weight.numel() for weight in trainer.weights),
        "arguments": {**vars(arguments), "out": arguments.out.name}, "steps": [],
    }
    losses: list[Tensor] = []
    kept: list[Pack] = []
    draw = random.Random(arguments.seed)
    turns, waited = 0, 0.0
    while trainer.step < arguments.steps:
        if trainer.step % REPEATS == 0:
            asked = time.perf_counter()
            fresh = next(batches)
            waited += time.perf_counter() - asked
            turns += int(fresh.answer_turns.max()) + 1
            pack = to_device(fresh, device)
            kept = [*kept[-KEPT_PACKS:], pack]
        else:
            pack = draw.choice(kept)
        losses.append(trainer.train(pack))
        if trainer.step % arguments.report_every == 0 or trainer.step in (20, arguments.steps):
            entry = {
                "step": trainer.step, "loss": round(torch.stack(losses).mean().item(), 4), "different_questions": turns,
                "seconds": round(time.perf_counter() - started, 1), "waited_for_data": round(waited, 1),
                "held_out_exact": accuracy(model, questions, looked_at),
            }
            losses = []
            log["steps"].append(entry)
            print(json.dumps(entry), flush=True)
            save(model, arguments.out)
            (arguments.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
