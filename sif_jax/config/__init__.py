"""Configs: what every command can be told, and how it is read (host)."""

from sif_jax.config.demo import DemoConfig, DemoScenesConfig, ScenesBuildConfig, TinyModelConfig, TinyVisionConfig
from sif_jax.config.files import FieldRow, config_text, describe, dump_config, flat_config, load_config
from sif_jax.config.inference import EvalConfig, ExportConfig, GenerateConfig, SamplingConfig
from sif_jax.config.inputs import BucketsConfig, DataConfig, ModelConfig, PromptConfig
from sif_jax.config.mesh import MeshConfig
from sif_jax.config.reinforcement import GrpoConfig, JudgeConfig, ObjectiveConfig, RemoteConfig, RewardsConfig
from sif_jax.config.studies import (
    AblationConfig,
    DecodeBenchConfig,
    HacksBenchConfig,
    PrecisionBenchConfig,
    RematBenchConfig,
    RewardsBenchConfig,
    TrainBenchConfig,
    VariantConfig,
)
from sif_jax.config.training import (
    KeepBestConfig,
    LoraConfig,
    OptimizerConfig,
    RunConfig,
    RunName,
    SftConfig,
    TrainConfig,
)

__all__ = [
    "AblationConfig",
    "BucketsConfig",
    "DataConfig",
    "DecodeBenchConfig",
    "DemoConfig",
    "DemoScenesConfig",
    "EvalConfig",
    "ExportConfig",
    "FieldRow",
    "GenerateConfig",
    "GrpoConfig",
    "HacksBenchConfig",
    "JudgeConfig",
    "KeepBestConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PrecisionBenchConfig",
    "PromptConfig",
    "RematBenchConfig",
    "RemoteConfig",
    "RewardsBenchConfig",
    "RewardsConfig",
    "RunConfig",
    "RunName",
    "SamplingConfig",
    "ScenesBuildConfig",
    "SftConfig",
    "TinyModelConfig",
    "TinyVisionConfig",
    "TrainBenchConfig",
    "TrainConfig",
    "VariantConfig",
    "config_text",
    "describe",
    "dump_config",
    "flat_config",
    "load_config",
]
