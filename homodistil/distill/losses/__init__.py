"""Terms of the objective: one class per term (term.py defines the interface), and what several of them share."""

from homodistil.distill.losses.attention import Attention
from homodistil.distill.losses.cosine import Cosine
from homodistil.distill.losses.embedding import Embedding
from homodistil.distill.losses.hidden import Hidden
from homodistil.distill.losses.labels import Labels
from homodistil.distill.losses.pooled import Pooled
from homodistil.distill.losses.relations import Relations
from homodistil.distill.losses.scores import ScoresKL, ScoresMSE
from homodistil.distill.losses.term import register
from homodistil.distill.losses.vocabulary import Vocabulary

# In this order they are compared and make their modules, whose order checkpoints and optimizers know.
for _term in (Vocabulary, Embedding, Hidden, Attention, Cosine, Relations, Pooled, ScoresKL, ScoresMSE, Labels):
    register(_term)
