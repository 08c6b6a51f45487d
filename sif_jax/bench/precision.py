"""How far a checkpoint's logits in bfloat16 are from those in float32: KL per token (io)."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32

from sif_jax.api import VLM
from sif_jax.bench.report_line import Figures, machine, text_report
from sif_jax.config import ModelConfig, PrecisionBenchConfig
from sif_jax.data.example import ExampleEncoder
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor, Encoded, messages_with_images
from sif_jax.models.qwen2_5_vl.checkpoint import find_checkpoint, open_model, open_processor
from sif_jax.sif.prompts import user_text
from sif_jax.sif.record import read_records

QUESTIONS = {
    "text": ("Write a short story about a lighthouse keeper who repairs clocks.", 0),
    "one image": ("<image>\nDescribe the picture, then say what colour its lower left corner has.", 1),
    "two images": (user_text("Which side of the picture is nearer to the camera?"), 2),
}


def measure(config: PrecisionBenchConfig) -> Figures:
    """Mean and largest KL(float32 ‖ model.dtype) over every token of every input; both models are held at once."""
    reference = _open(config.model.model_copy(update={"dtype": "float32"}))
    compared = _open(config.model)
    inputs: dict[str, Figures] = {}
    every: list[Float[np.ndarray, " T"]] = []
    for name, encoded in _inputs(config, compared.processor):
        with jax.default_matmul_precision("highest"):
            exact = reference.logits(encoded)
        logits = compared.logits(encoded)
        kl = kl_per_token(exact, logits)
        same = exact.argmax(-1) == logits.argmax(-1)
        inputs[name] = _summary(kl) | {"same_likeliest_token": float(same.mean())}
        every.append(kl)
    return {
        "bench": "precision",
        "machine": machine(),
        "config": config.model_dump(mode="json"),
        **_summary(np.concatenate(every)),
        "inputs": inputs,
    }


def report(figures: Figures) -> str:
    header = ["input", "tokens", "mean KL, nats", "largest KL, nats", "same likeliest token"]
    rows = [
        [name, f"{x['tokens']}", f"{x['mean_kl']:.2e}", f"{x['max_kl']:.2e}", f"{x['same_likeliest_token']:.3f}"]
        for name, x in figures["inputs"].items()
    ]
    whole = ["all", f"{figures['tokens']}", f"{figures['mean_kl']:.2e}", f"{figures['max_kl']:.2e}", ""]
    return text_report(figures, header, [*rows, whole])


def kl_per_token(exact: Float32[np.ndarray, "T V"], logits: Float32[np.ndarray, "T V"]) -> Float[np.ndarray, " T"]:
    """KL(p ‖ q) of the next-token distributions after each token, in nats, computed in float64."""
    return np.array([_kl(p, q) for p, q in zip(exact, logits, strict=True)])


def _kl(exact: Float32[np.ndarray, " V"], logits: Float32[np.ndarray, " V"]) -> float:
    log_p, log_q = (
        x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (exact.astype(float), logits.astype(float))
    )
    return float(np.exp(log_p) @ (log_p - log_q))


def _summary(kl: Float[np.ndarray, " T"]) -> Figures:
    return {"tokens": len(kl), "mean_kl": float(kl.mean()), "max_kl": float(kl.max())}


def _open(config: ModelConfig) -> VLM:
    model = open_model(config)
    return VLM(open_processor(config), model.config, *nnx.split(model), find_checkpoint(config).base)


def _inputs(config: PrecisionBenchConfig, chat: ChatProcessor) -> Iterator[tuple[str, Encoded]]:
    if config.data is None:
        images = _pictures()
        for name, (text, count) in QUESTIONS.items():
            yield name, chat.encode(messages_with_images([{"role": "user", "content": text}], images[:count]))
        return
    data = config.data
    file = read_records(data.path, image_root=data.image_root, on_error=data.on_error)
    records = file.records[: data.limit]
    if not records:
        raise InputError("no records to use", file=data.path, expected="at least one")
    encode = ExampleEncoder(records, file.image_root, chat, "cot", **config.prompt.model_dump())
    for index in range(len(records)):
        example = encode(index)
        yield f"row {file.rows[index]}", Encoded(example.tokens, example.positions, example.images)


def _pictures() -> list[np.ndarray]:
    """Noise on a ramp of colour, and a ramp of depth."""
    rng, (height, width) = np.random.default_rng(0), (252, 364)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8) // 4
    colour = noise + (np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], -1) // 2)[None]
    return [colour, np.repeat(np.broadcast_to(ramp, (height, width))[..., None], 3, axis=-1)]
