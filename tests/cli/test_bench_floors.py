"""The floors, against figures worked out by hand for three published models, on the device whose numbers are the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmv1.cli.bench_serve import Load, floor_rps
from mmv1.cli.floors import Device, LanguageModel, Request, VisionTower, floor_of, read_model
from mmv1.cli.load import Sample
from mmv1.cli.workload import PictureSize, Prompt
from mmv1.errors import ConfigError

VISION_25 = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
VISION_3 = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "2.5-7B": {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "vision_config": VISION_25 | {"out_hidden_size": 3584},
    },
    "2.5-3B": {
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "intermediate_size": 11008, "vocab_size": 151936,
        "vision_config": VISION_25 | {"out_hidden_size": 2048},
    },
    "3-8B": {
        "model_type": "qwen3_vl", "vision_config": VISION_3,
        "text_config": {
            "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "intermediate_size": 12288, "vocab_size": 151936,
        },
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "2-7B": CONFIGS["2.5-7B"] | {
        "model_type": "qwen2_vl",
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 3584},
    },
    "llama-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    },
    "30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
}  # fmt: skip
ONE = ((1024, 1024),)
LOADS = {
    "A448": Request(images=((448, 448),)),
    "A": Request(images=ONE),
    "B": Request(images=ONE, reuse=8),
    "C": Request(images=ONE, shared_prefix=2048),
    "D": Request(images=ONE * 8),
    "E": Request(images=ONE, output_tokens=1024),
}
# Requests/s, overlapped and one after the other.
RATES = {
    "2.5-7B": {"A448": (111, 100), "A": (28.1, 25.5), "B": (138, 126), "C": (26.9, 24.5), "D": (3.5, 3.1), "E": (17.7, 11.1)},
    "2.5-3B": {"A448": (207, 184), "A": (47.9, 43.2), "B": (259, 234), "C": (45.4, 41.2), "D": (5.7, 5.1), "E": (30.7, 19.1)},
    "3-8B": {"A448": (129, 103), "A": (34.7, 27.8), "B": (151, 123), "C": (32.6, 26.5), "D": (4.4, 3.4), "E": (9.3, 7.5)},
}


def model_dir(folder: Path, name: str, **processor: object) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    most = 16_777_216 if name == "3-8B" else 12_845_056
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": most} | processor))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_rates_of_published_models(tmp_path: Path, name: str) -> None:
    model, tower = read_model(model_dir(tmp_path, name))
    for load, (ideal, serial) in RATES[name].items():
        floor = floor_of(model, tower, LOADS[load])
        digits = 0 if ideal > 100 else 1
        assert (round(floor.ideal_rps, digits), round(floor.serial_rps, 0 if serial >= 100 else 1)) == (ideal, serial), load


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes", "tower_millions", "ttft_ms", "tpot_ms"),
    [
        ("2.5-7B", 7.070, 57_344, 630, 33.3, 4.74), ("2.5-3B", 3.086, 36_864, 630, 19.8, 2.08),
        ("3-8B", 7.568, 147_456, 411, 26.3, 5.10),
    ],
)  # fmt: skip
def test_sizes_and_latencies_of_published_models(
    tmp_path: Path, name: str, billions: float, kv_bytes: int, tower_millions: int, ttft_ms: float, tpot_ms: float
) -> None:
    model, tower = read_model(model_dir(tmp_path, name))
    assert round((model.layer_parameters + model.head_parameters) / 1e9, 3) == billions
    assert (model.kv_bytes_per_token, round(tower.num_parameters / 1e6)) == (kv_bytes, tower_millions)
    floor = floor_of(model, tower, LOADS["A"])
    assert (round(floor.ttft_ms, 1), round(floor.tpot_ms, 2)) == (ttft_ms, tpot_ms)


@pytest.mark.parametrize(
    ("name", "size", "patches", "tokens", "encode_ms", "prefill_ms"),
    [
        ("2.5-7B", (448, 448), 1024, 256, 1.68, 4.19), ("2.5-7B", (1280, 960), 6256, 1564, 11.1, 26.1),
        ("2.5-7B", (4000, 3000), 61204, 15301, 195, 308), ("2.5-3B", (1024, 1024), 5476, 1369, 9.59, 9.84),
        ("3-8B", (448, 448), 784, 196, 0.98, 3.42), ("3-8B", (4000, 3000), 47000, 11750, 397, 255),
    ],
)  # fmt: skip
def test_pictures_of_published_models(
    tmp_path: Path, name: str, size: tuple[int, int], patches: int, tokens: int, encode_ms: float, prefill_ms: float
) -> None:
    model, tower = read_model(model_dir(tmp_path, name))
    assert tower.grid(*size) == (patches, tokens)
    assert 1000 * tower.flops(patches, tokens) / 800e12 == pytest.approx(encode_ms, rel=0.005)
    assert 1000 * model.prefill_flops(tokens) / 800e12 == pytest.approx(prefill_ms, rel=0.005)


def test_pixel_bounds_are_the_image_processors(tmp_path: Path) -> None:
    _, tower = read_model(model_dir(tmp_path, "2.5-7B", max_pixels=28 * 28 * 1280, min_pixels=28 * 28 * 100))
    assert tower.grid(1024, 1024)[1] == 35 * 35  # 980 x 980
    assert tower.grid(56, 56)[1] == 100


def test_a_faster_device_and_a_smaller_batch(tmp_path: Path) -> None:
    model, tower = read_model(model_dir(tmp_path, "2.5-7B"))
    assert floor_of(model, tower, LOADS["A"], device=Device(flops=1600e12)).ideal_rps > 50
    alone = floor_of(model, tower, LOADS["A"], max_batch=1)
    assert alone.batch == 1 and alone.decode_ms == pytest.approx(128 * 4.74, rel=0.01)
    assert floor_of(model, tower, LOADS["D"]).batch == 92  # as many as the memory holds the KV of


def read(tmp_path: Path, name: str) -> tuple[LanguageModel, VisionTower]:
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12_845_056}))
    return read_model(tmp_path)


def test_a_tower_that_attends_over_the_whole_picture_in_every_layer(tmp_path: Path) -> None:
    _, tower = read(tmp_path, "2-7B")
    assert 1000 * tower.flops(*tower.grid(1024, 1024)) / 800e12 == pytest.approx(14.9, rel=0.005)


def test_a_model_of_text_alone_has_no_tower(tmp_path: Path) -> None:
    model, tower = read(tmp_path, "llama-8B")
    assert round((model.layer_parameters + model.head_parameters) / 1e9, 2) == 7.50  # its 8.03 billion less the embedding
    floor = floor_of(model, tower, Request(text_tokens=512))
    assert (floor.encode_ms, round(floor.tpot_ms, 2)) == (0.0, round(2 * 7.5046e9 / 3e12 * 1000 + 0.025, 2))


def test_a_mixture_reads_the_experts_that_somebody_is_sent_to(tmp_path: Path) -> None:
    model, _ = read(tmp_path, "30B-A3B")
    total = model.parameters(128) + 2 * model.head_parameters
    assert (round(total / 1e9, 1), round((model.layer_parameters + 2 * model.head_parameters) / 1e9, 2)) == (30.5, 3.35)
    assert model.read_parameters(1) == pytest.approx(model.layer_parameters)
    experts = 128 * 3 * 2048 * 768 * 48
    all_but = model.parameters(128) - model.read_parameters(64)
    assert all_but == pytest.approx(experts * (1 - 8 / 128) ** 64)


def test_a_model_without_formulas_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ConfigError, match="no formulas for the floor of a 'other' model"):
        read_model(tmp_path)


def test_the_floor_of_what_was_asked_and_answered(tmp_path: Path) -> None:
    formulas = read_model(model_dir(tmp_path, "2.5-7B"))
    size = PictureSize(1024, 1024)
    prompts = [Prompt("", [f"picture {index // 8}"], 128, [size]) for index in range(256)]
    samples = [Sample(num_prompt_tokens=1369 + 50, num_output_tokens=128)] * 256

    def rps(prompts: list[Prompt], max_concurrency: int | None = None) -> float:
        load = Load(warmups=[], prompts=prompts, gaps_s=[], max_concurrency=max_concurrency)
        return floor_rps(formulas, load, samples, Device()) or 0.0

    assert round(rps(prompts)) == 138
    unique = [prompt._replace(pictures=[str(index)]) for index, prompt in enumerate(prompts)]
    assert round(rps(unique), 1) == 28.1
    assert rps(unique, 1) == pytest.approx(1 / (0.0333 + 128 * 0.00474), rel=0.01)  # one after the other: nothing overlaps
    mixed = [prompt._replace(sizes=[PictureSize(448, 448)]) if index % 2 else prompt for index, prompt in enumerate(unique)]
    assert 28.1 < rps(mixed) < 111
    failed = Load(warmups=[], prompts=prompts[:1], gaps_s=[], max_concurrency=None)
    assert floor_rps(formulas, failed, [Sample(error="it broke")], Device()) is None
