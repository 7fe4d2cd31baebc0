"""Low-rank adapters of a model as settings: which matrices have one, of which rank and strength.

A target is a part (`attn.2`: its four projections, `mlp.0`, `wte`, `lm_head`) or one projection of it
(`attn.2.q_proj`), which then overrides its part. The table is part of the model's shape, and so of
config.json: whoever reads it builds the same adapters.
"""

from __future__ import annotations

import math

from llm_trainer.config.schema.base import Section, setting

DEFAULT_NAME = "default"  # of the set that the single settings describe


class LoraConfig(Section):
    """One set of low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    ranks: dict[str, int] = setting(dict, "target → rank; 0: none")
    alpha: float | None = setting(
        None,
        "strength; the product is scaled by alpha / rank; none: twice the rank",
        aliases=("lora_alpha",),
        gt=0,
    )
    alphas: dict[str, float] = setting(dict, "target → alpha, where it is another")
    dropout: float = setting(
        0.0, "dropout on what attention's and MLP's adapters read", aliases=("lora_dropout",), ge=0, lt=1
    )
    use_rslora: bool = setting(False, "scale by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732)")

    def rank_of(self, target: str) -> int:
        """Rank of a projection (`attn.2.q_proj`), `wte` or `lm_head`."""
        part = ".".join(target.split(".")[:2])
        return self.ranks.get(target, self.ranks.get(part, 0))

    def scale_of(self, target: str) -> float:
        """What the product of this target's adapter is multiplied by."""
        rank = self.rank_of(target)
        return self.strength_of(target) / (math.sqrt(rank) if self.use_rslora else rank)

    def strength_of(self, target: str) -> float:
        """Alpha of this target, after the default."""
        part = ".".join(target.split(".")[:2])
        alpha = self.alphas.get(target, self.alphas.get(part, self.alpha))
        return 2.0 * self.rank_of(target) if alpha is None else alpha

    def with_tied_head(self) -> LoraConfig:
        """The same for a model whose head is its embedding's matrix: one adapter for both, under `wte`."""
        if "lm_head" not in self.ranks and "lm_head" not in self.alphas:
            return self
        ranks = {"wte": self.ranks.get("lm_head", 0), **self.ranks}
        ranks.pop("lm_head", None)
        alphas = {**({"wte": self.alphas["lm_head"]} if "lm_head" in self.alphas else {}), **self.alphas}
        alphas.pop("lm_head", None)
        return self.model_copy(update={"ranks": ranks, "alphas": alphas})
