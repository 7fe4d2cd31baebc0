"""LoRA adapters of a model as settings: which matrices have one, and with which rank and alpha.

A target is a module (`attn.2`: its four projections, `mlp.0`, `wte`, `lm_head`) or one projection of it
(`attn.2.q_proj`), which overrides the module. The adapters belong to the model's configuration and are saved
in config.json, so that the same adapters are built when the model is loaded.
"""

from __future__ import annotations

import math

from llm_trainer.config.schema.base import Section, setting

DEFAULT_ADAPTER = "default"  # the adapter that the rank settings of ModelConfig describe


class LoraConfig(Section):
    """One LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

    ranks: dict[str, int] = setting(dict, "Rank by target. 0: none.")
    alpha: float | None = setting(
        None,
        "The update is scaled by alpha / rank. Unset: twice the rank.",
        aliases=("lora_alpha",),
        gt=0,
    )
    alphas: dict[str, float] = setting(dict, "Alpha by target, where it differs.")
    dropout: float = setting(
        0.0,
        "Dropout probability on the inputs of the adapters of attention and MLP.",
        aliases=("lora_dropout",),
        ge=0,
        lt=1,
    )
    use_rslora: bool = setting(
        False, "Scale the update by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732)."
    )

    def rank_of(self, target: str) -> int:
        """Rank of a projection (`attn.2.q_proj`), `wte` or `lm_head`; 0 without an adapter."""
        module = ".".join(target.split(".")[:2])
        return self.ranks.get(target, self.ranks.get(module, 0))

    def scale_of(self, target: str) -> float:
        """Factor by which this target's update is scaled."""
        rank = self.rank_of(target)
        return self.alpha_of(target) / (math.sqrt(rank) if self.use_rslora else rank)

    def alpha_of(self, target: str) -> float:
        """Alpha of this target, with the default filled in."""
        module = ".".join(target.split(".")[:2])
        alpha = self.alphas.get(target, self.alphas.get(module, self.alpha))
        return 2.0 * self.rank_of(target) if alpha is None else alpha

    def with_tied_head(self) -> LoraConfig:
        """The same adapter for a model with tied embeddings: head and embedding have one adapter, under
        `wte`.
        """
        if "lm_head" not in self.ranks and "lm_head" not in self.alphas:
            return self
        ranks = {"wte": self.ranks.get("lm_head", 0), **self.ranks}
        ranks.pop("lm_head", None)
        alphas = {**({"wte": self.alphas["lm_head"]} if "lm_head" in self.alphas else {}), **self.alphas}
        alphas.pop("lm_head", None)
        return self.model_copy(update={"ranks": ranks, "alphas": alphas})
