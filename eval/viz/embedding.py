"""Lay images out on a plane, similar ones close together: t-SNE (van der Maaten and Hinton, JMLR 9,
2008) by openTSNE, of unit-length features in their first 50 principal components.

openTSNE rather than scikit-learn's own: it is faster, tells how far it has come, and gives the same
places with any number of threads, which a sum in scikit-learn's does not (docs/atlas.md).
"""

import os

import numpy as np
from jaxtyping import Float, Float64
from rich.progress import Progress

from ssl_xcit.errors import UserError

from ..features.neighbors import unit

COMPONENTS = 50
FEW = 5  # of fewer points the two first components are the places
EARLY, LATE = 250, 500  # iterations, with and without exaggeration: openTSNE's defaults
TOLD = 10  # iterations between two notes of progress
ONE_THREAD = 2_000  # points up to which a second thread gains less than its waiting may cost
BARNES_HUT = 5_000  # points up to which trees take no longer than Fourier transforms
EXACT = 30_000  # points up to which all distances take no longer than an index of neighbours


def tsne(
    features: Float[np.ndarray, "N C"], perplexity: float = 30.0, seed: int = 0, show: bool = False
) -> Float[np.ndarray, "N 2"]:
    """Places of rows by the cosines of their features, which are finite, any number of rows from 1,
    and may be a memory map; the same for the same seed. Raises UserError where openTSNE is missing.

    Args:
        perplexity: about how many neighbours each has; less where there are few rows.
        seed: of the little noise that parts equal rows at the start.
    """
    points = components(unit(features).astype(np.float64), COMPONENTS)
    if len(points) < FEW or not points.any():
        return planar(points)
    try:
        import openTSNE  # only where it is needed: half a second
    except ImportError as error:  # on Linux there are wheels for x86-64 only
        raise UserError(
            "a map needs openTSNE: pip install openTSNE (here with a C++ compiler)"
        ) from error
    start = first_places(points, seed)
    num_threads = 1 if len(points) <= ONE_THREAD else max(1, os.cpu_count() or 1)
    with Progress(transient=True, disable=not show) as progress:
        bar = progress.add_task("arranging", total=EARLY + LATE)

        def tell(*_: object) -> bool:
            progress.advance(bar, TOLD)
            return False  # true would end it

        places = openTSNE.TSNE(
            perplexity=min(perplexity, (len(points) - 1) / 3),
            initialization=start,
            neighbors="exact" if len(points) <= EXACT else "approx",
            negative_gradient_method="bh" if len(points) <= BARNES_HUT else "fft",
            early_exaggeration_iter=EARLY,
            n_iter=LATE,
            n_jobs=num_threads,
            callbacks=tell,
            callbacks_every_iters=TOLD,
            random_state=seed,
        ).fit(points)
    # where the axes lie means nothing: the longest is laid across, as screens are wide
    return components(np.asarray(places, np.float64), 2)


def components(rows: Float64[np.ndarray, "N C"], most: int) -> Float64[np.ndarray, "N _"]:
    """Rows in their first principal components, at most so many; each component's largest loading
    is positive, so that signs mean nothing.
    """
    centred = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    vectors = vectors[:, ::-1][:, :most]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    scores = centred @ (vectors * np.where(largest < 0, -1.0, 1.0))
    # rounding is no difference: rows that are equal have equal places
    return np.where(np.abs(scores) < 1e-12, 0.0, scores)


def planar(points: Float64[np.ndarray, "N _"]) -> Float64[np.ndarray, "N 2"]:
    """The first two components, zeros where there are fewer."""
    plane = np.zeros((len(points), 2))
    plane[:, : points.shape[1]] = points[:, :2]
    return plane


def first_places(points: Float64[np.ndarray, "N _"], seed: int) -> Float64[np.ndarray, "N 2"]:
    """The first two components, of deviation 1e-4 (Kobak and Berens, Nature Communications 10,
    2019), with a hundredth of it as noise: equal rows would never part.
    """
    start = planar(points)
    start *= 1e-4 / start[:, 0].std()
    return start + np.random.default_rng(seed).normal(scale=1e-6, size=start.shape)
