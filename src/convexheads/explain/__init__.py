"""What a fitted head says: spectra, latent dimensions, effective classifiers, clusters of tokens, figures.

Every function takes a fitted estimator, or a fitted scikit-learn pipeline that ends in one. Figures need the extra
``plots``; everything else needs nothing beyond the package.
"""

from convexheads.explain.classifiers import (
    TokenClassifiers,
    effective_classifiers,
    token_classifiers,
    token_contributions,
)
from convexheads.explain.clusters import (
    PlantedClusters,
    Recovery,
    TokenClusters,
    cluster_directions,
    cluster_recovery,
    cluster_tokens,
    planted_clusters,
)
from convexheads.explain.latent import LatentEnergies, latent_energies
from convexheads.explain.spectra import (
    BlockSpectrum,
    GateSparsity,
    Truncation,
    gate_sparsity,
    spectra,
    truncate,
    truncation_curve,
)

__all__ = [
    "BlockSpectrum",
    "GateSparsity",
    "LatentEnergies",
    "PlantedClusters",
    "Recovery",
    "TokenClassifiers",
    "TokenClusters",
    "Truncation",
    "cluster_directions",
    "cluster_recovery",
    "cluster_tokens",
    "effective_classifiers",
    "gate_sparsity",
    "latent_energies",
    "planted_clusters",
    "spectra",
    "token_classifiers",
    "token_contributions",
    "truncate",
    "truncation_curve",
]
