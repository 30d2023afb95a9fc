"""Section of the run config about the loss terms: their weights and variants. See `schema.py`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from homodistil.config.option import CORRECTION, COUNT, SAME, WEIGHT, option

POOLED_WEIGHTS = ("pooled_cosine", "pooled_mse", "pooled_similarity")
"""Fields of LossConfig that are weights of terms on vectors of texts."""
SCORE_WEIGHTS = ("scores_kl", "scores_mse")
"""Fields of LossConfig that are weights of terms on the logits of a head of labels."""
_OF_LAYERS = ("hidden", "attention", "embedding", "cosine", "relations")
_WEIGHTS = ("mlm", "kl", *_OF_LAYERS, *POOLED_WEIGHTS, *SCORE_WEIGHTS, "labels")
"""Fields of LossConfig that are the weights of loss terms."""


@dataclass(kw_only=True)
class LossConfig:
    """loss: weights and variants of the terms"""

    mlm: float = option(1.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 1.0})
    """Weight of language modelling (>= 0): of masked tokens, or of the next one, which lines and reports call lm."""
    kl: float = option(4.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """alpha1: weight of KL(teacher || student) of the vocabulary head's output (>= 0; paper: 1)."""
    hidden: float = option(1.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """alpha2: weight of the hidden-state MSE, summed over layers (>= 0)."""
    attention: float = option(1.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """alpha3: weight of the attention MSE, summed over layers (>= 0)."""
    embedding: float = option(1.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """alpha4: weight of the embedding MSE (>= 0)."""
    cosine: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """Weight of 1 - cosine of the last hidden states (DistilBERT), mean over tokens (>= 0)."""
    relations: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="shared", derived={CORRECTION: 0.0})
    """Weight of KL(teacher || student) of the self-attention relations Q-Q, K-K and V-V (MiniLMv2) (>= 0)."""
    relation_heads: int = option(0, low=0, high=COUNT, resume="fixed", students="shared", derived=SAME)
    """Number of relation heads into which the dims of all heads are regrouped (0: the teacher's number of heads)."""
    relation_layer: int = option(
        -1,
        limited_by="distill/losses/relations.py: a layer of the teacher",
        resume="fixed",
        students="shared",
        derived=SAME,
    )
    """Teacher layer whose relations the student's last layer learns; negative counts from the last."""
    pooled_cosine: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """Weight of 1 - cosine of the vectors of texts, mean over texts (>= 0). Task embedding alone, which sets it to 10
    where none of the weights of vectors is set."""
    pooled_mse: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """Weight of the squared distance of the vectors of texts, mean over texts and dims (>= 0). Where the teacher's
    modules end with Normalize, vectors are normalised first; the term is then a multiple of pooled_cosine."""
    pooled_similarity: float = option(
        0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0}
    )
    """Weight of KL(teacher || student) of each text's similarities (softmax of cosines / similarity_temperature) to the
    other texts of its micro-batch, mean over texts (>= 0). Alone of the three, it leaves the student's vectors as wide
    as its hidden states; with the others they have the teacher's dims, through a matrix that is learned."""
    similarity_temperature: float = option(
        0.05, low=0, high=1000, exclude="low", resume="fixed", students="own", derived=SAME
    )
    """Temperature of the pooled_similarity term (> 0)."""
    scores_kl: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """Weight of KL(teacher || student) of the probabilities of labels, mean over texts (>= 0). Task scores alone, which
    sets it to 4 for teachers with labels of which one holds, where neither weight of scores is set."""
    scores_mse: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """Weight of the squared distance of the logits of labels, mean over texts and labels (>= 0). Task scores sets it to
    1 for rerankers, regression and labels of which several hold, where neither weight of scores is set."""
    scores_temperature: float = option(
        1.0, low=0, high=1000, exclude="low", resume="fixed", students="own", derived=SAME
    )
    """Temperature of the scores_kl term (> 0); the term is multiplied by its square."""
    labels: float = option(0.0, low=0, high=WEIGHT, resume="fixed", students="own", derived={CORRECTION: 0.0})
    """Weight of the loss against ground-truth labels (data.label_column), mean over the texts that have one (>= 0):
    cross-entropy, squared distance or binary cross-entropy, as the teacher's config.json says (docs/classifiers.md). 1
    where data.label_column is set, unless it is set."""
    kl_temperature: float = option(1.0, low=0, high=1000, exclude="low", resume="fixed", students="own", derived=SAME)
    """Temperature of the KL term (> 0); the term is multiplied by its square."""
    kl_positions: Literal["masked", "all"] = option("masked", resume="fixed", students="own", derived=SAME)
    """Tokens over which the KL term is computed: the masked ones or all."""
    attention_target: Literal["auto", "scores", "centred_scores", "probabilities", "probabilities_kl"] = option(
        "auto", resume="fixed", students="own", derived=SAME
    )
    """What the attention term compares. scores: q.k/sqrt(d) before the softmax, by MSE (as in TinyBERT's code);
    centred_scores: the same without each query's mean over the keys it sees, which softmax ignores; probabilities:
    after the softmax, by MSE; probabilities_kl: KL(teacher || student) per query. auto: probabilities_kl for causal
    models, else scores."""
    hidden_space: Literal["auto", "raw", "normalised"] = option("auto", resume="fixed", students="own", derived=SAME)
    """What the hidden and embedding terms compare. raw: states as they are; normalised: each token's states divided by
    their root mean square, so that no massive activation decides the term. auto: raw for models with a LayerNorm at the
    end of each block (the paper), normalised for those whose norms stand before the blocks."""
    skip_first_tokens: int = option(0, low=0, high=COUNT, resume="fixed", students="shared", derived=SAME)
    """Tokens at the beginning of each sequence that the hidden term leaves out (>= 0, < data.seq_len): attention sinks
    have massive activations."""
    projection: Literal["student", "teacher"] = option("student", resume="fixed", students="own", derived=SAME)
    """Side of W in the hidden and embedding terms: MSE(H_s W, H_t), or MSE(H_s, H_t W) as on the paper's slide."""
    projection_learned: bool = option(True, resume="fixed", students="own", derived=SAME)
    """Train W; false: W stays the selection of the remaining dims."""
    kernels: Literal["auto", "torch", "triton"] = option("auto", resume="fixed", students="own", derived=SAME)
    """Implementation of the terms. auto: Triton on a GPU if it is installed, otherwise torch."""
    extra: dict[str, float] = option(
        {}, low=0, high=WEIGHT, resume="fixed", students="shared", derived={CORRECTION: {}}
    )
    """Weights (>= 0) by name of terms that loss.plugins register, as in {my_term: 0.5}."""
    plugins: list[str] = option(
        [], limited_by="distill/losses/active.py: can be imported", resume="free", students="shared", derived=SAME
    )
    """Python modules or .py files that register further terms. They are imported, and so executed, on every rank."""

    @property
    def weights(self) -> dict[str, float]:
        """Term -> weight of all terms with a weight > 0: first the fields, then `extra`, each in its order."""
        named = {name: getattr(self, name) for name in _WEIGHTS} | self.extra
        return {name: float(weight) for name, weight in named.items() if weight > 0}

    def only(self, **weights: float) -> LossConfig:
        """A copy with these weights; all other weights are 0."""
        return dataclasses.replace(self, **dict.fromkeys(_WEIGHTS, 0.0) | {"extra": {}} | weights)
