"""Who scores the answers (host)."""

from sif_jax.config import JudgeConfig
from sif_jax.judge.completions import Judge, Judged, JudgeStoppedError, RuleJudge

__all__ = ["Judge", "JudgeStoppedError", "Judged", "RuleJudge", "open_judge"]


def open_judge(config: JudgeConfig) -> Judge:
    """The judge that the config names, ready to be asked.

    Raises:
      InputError: its key is missing, its URL is wrong or its cache cannot be written.
    """
    if config.kind == "rule":
        return RuleJudge()
    from sif_jax.judge.openai import OpenAIJudge

    return OpenAIJudge(config)
