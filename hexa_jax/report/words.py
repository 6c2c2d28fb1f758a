"""Whether a run goes well, in words: findings from its curves, and a verdict from the findings."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hexa_jax.report.charts import number
from hexa_jax.report.record import RunRecord

GOOD, WATCH, BAD, PLAIN = "good", "watch", "problem", "note"
COLLAPSED = 0.02  # spread of embeddings below which all are nearly the same
STARVED = 0.3  # share of the time spent on waiting for input
MANY = 0.01  # share of unreadable files that deserves a look
LITTLE = 0.03  # relative change that counts as none

Curve = Sequence[tuple[float, float]]


class Finding(NamedTuple):
    """One thing that can be said of a run.

    Attributes:
        title: what was looked at.
        value: the newest number, with its unit.
        status: GOOD, WATCH, BAD or PLAIN (a number that is neither by itself).
        words: a sentence or two.
        curve: over epochs; may be empty.
    """

    title: str
    value: str
    status: str
    words: str
    curve: Curve = ()


class Verdict(NamedTuple):
    """A status and one or two sentences."""

    status: str
    words: str


def trend(curve: Curve) -> str:
    """Return "rising", "falling" or "level" by the last third of a curve, or ""."""
    if len(curve) < 3:
        return ""
    then, now = curve[-1 - max(len(curve) // 3, 1)][1], curve[-1][1]
    scale = max(abs(then), abs(now), 1e-12)
    if abs(now - then) < LITTLE * scale:
        return "level"
    return "rising" if now > then else "falling"


def interval(percent: float, count: int | None) -> float:
    """Half the width of the 95 % interval of an accuracy in % measured on `count` images."""
    if not count:
        return 0.0
    share = min(max(percent / 100, 0.0), 1.0)
    return 100 * 1.96 * math.sqrt(max(share * (1 - share), 0.25 / count) / count)


def findings(record: RunRecord) -> list[Finding]:
    """Everything that can be said, the most telling first."""
    makers = (
        _accuracy,
        _spread,
        _rank,
        _neighbors,
        _stability,
        _evenness,
        _alignment,
        _input,
        _files,
    )
    return [finding for maker in makers if (finding := maker(record)) is not None]


def verdict(record: RunRecord) -> Verdict:
    """The findings in one sentence, with the worst status among them."""
    found = findings(record)
    bad = [finding for finding in found if finding.status == BAD]
    if bad:
        return Verdict(BAD, bad[0].words)
    if not found:
        return Verdict(PLAIN, "Nothing is measured yet.")
    lead = [f for f in found if f.title in ("Accuracy", "Effective rank", "Neighbors that agree")]
    words = " ".join(finding.words for finding in lead[:2]) or found[0].words
    watch = [finding for finding in found if finding.status == WATCH]
    if watch and watch[0] not in lead[:2]:
        words += " " + watch[0].words
    good = any(finding.status == GOOD for finding in lead)
    return Verdict(WATCH if watch else GOOD if good else PLAIN, words)


def _still(curve: Curve) -> str:
    """ ", still rising" and the like."""
    return {
        "rising": ", still rising",
        "falling": ", falling",
        "level": ", no longer changing",
    }.get(trend(curve), "")


def _accuracy(record: RunRecord) -> Finding | None:
    curve = record.curve("knn_accuracy")
    if not curve:
        return None
    now, images = curve[-1][1], record.facts.get("test_images")
    half = interval(now, images)
    value = f"{now:.1f}" + (f" ± {half:.1f}" if half else "") + " %"
    weights = "the initial weights" if record.initial else "random weights"
    if curve[-1][0] == 0:
        return Finding("Accuracy", value, PLAIN, f"kNN {value} with {weights}.", curve)
    prefix = "initial_" if record.initial else "random_"
    start = curve[0][1] if curve[0][0] == 0 else record.results.get(f"{prefix}knn_accuracy")
    of = f" on {images:,} images" if images else ""
    if start is None:
        return Finding("Accuracy", value, PLAIN, f"kNN {value}{of}{_still(curve)}.", curve)
    gain, noise = now - start, math.hypot(half, interval(start, images))
    against = f"kNN {value}{of} against {start:.1f} % with {weights}"
    pixels = record.results.get("pixels_knn_accuracy")
    if gain <= noise:
        evidence = "no evidence of a gain" if record.initial else "no evidence of learning"
        return Finding("Accuracy", value, WATCH, f"{against}: {evidence} yet.", curve)
    if pixels is not None and now - pixels <= noise:
        words = f"{against}, but raw pixels reach {pixels:.1f} %: the network does not beat them clearly."
        return Finding("Accuracy", value, WATCH, words, curve)
    return Finding("Accuracy", value, GOOD, f"{against}{_still(curve)}.", curve)


def _spread(record: RunRecord) -> Finding | None:
    curve = record.curve("embedding_std")
    if not curve:
        return None
    now = curve[-1][1]
    if now < COLLAPSED:
        words = (
            f"Embeddings have collapsed (spread {number(now)}; 1 is a full sphere): the loss says "
            "nothing any more. Try a lower learning rate, or more clusters or negatives."
        )
        return Finding("Spread of embeddings", number(now), BAD, words, curve)
    words = f"Embeddings are spread out by {number(now)} (0 is collapse, 1 a full sphere){_still(curve)}."
    return Finding("Spread of embeddings", number(now), GOOD if now > 0.2 else WATCH, words, curve)


def _rank(record: RunRecord) -> Finding | None:
    curve = record.curve("rankme")
    if not curve:
        return None
    now, limit = curve[-1][1], record.facts.get("rank_limit")
    value = f"{now:.0f}" if now >= 20 else f"{now:.1f}"
    of = f" of {limit}" if limit else ""
    trained = [(x, y) for x, y in curve if x > 0]
    top = max((y for _, y in trained), default=now)
    if now < 2:
        words = f"Effective rank {value}{of}: all features lie close to one line. The network has collapsed."
        return Finding("Effective rank", value + of, BAD if trained else WATCH, words, curve)
    words = f"Effective rank {value}{of}{_still(trained)}."
    if trained and now < 0.6 * top:
        words = (
            f"Effective rank fell to {value}{of} from {top:.0f}: features lose directions. Look at "
            "the loss and the learning rate."
        )
        return Finding("Effective rank", value + of, WATCH, words, curve)
    return Finding("Effective rank", value + of, GOOD if trained else PLAIN, words, curve)


def _neighbors(record: RunRecord) -> Finding | None:
    curve = record.curve("neighbor_agreement")
    if not curve:
        return None
    now, start = curve[-1][1], curve[0][1]
    value = f"{100 * now:.0f} %"
    words = f"Two crops of an image share {value} of their nearest images{_still(curve)}"
    if curve[-1][0] == 0:
        return Finding("Neighbors that agree", value, PLAIN, f"{words} at the start.", curve)
    if curve[0][0] == 0 and now <= start + 0.01:
        words += f", no more than at the start ({100 * start:.0f} %)."
        status = PLAIN if record.initial else WATCH
        return Finding("Neighbors that agree", value, status, words, curve)
    known = f" ({100 * start:.0f} % at the start)" if curve[0][0] == 0 else ""
    return Finding("Neighbors that agree", value, GOOD, f"{words}{known}.", curve)


def _stability(record: RunRecord) -> Finding | None:
    curve = record.curve("cluster_stability")
    if not curve:
        return None
    now = curve[-1][1]
    kept = (
        "are much the same as"
        if now > 0.6
        else "have changed since"
        if now > 0.2
        else "have little to do with"
    )
    words = f"Clusters of the sample {kept} those measured before (Rand index {number(now)}; 1 is the same, 0 chance)."
    return Finding("Cluster stability", number(now), GOOD if now > 0.6 else PLAIN, words, curve)


def _evenness(record: RunRecord) -> Finding | None:
    curve = record.curve("cluster_evenness")
    if not curve:
        return None
    now = curve[-1][1]
    words = f"Cluster sizes are as even as if {100 * now:.0f} % of the clusters held all images."
    if now < 0.3:
        words += " A few clusters swallow most images."
    return Finding(
        "Evenness of clusters", f"{100 * now:.0f} %", WATCH if now < 0.3 else PLAIN, words, curve
    )


def _alignment(record: RunRecord) -> Finding | None:
    curve, uniformity = record.curve("alignment"), record.last("uniformity")
    if not curve or uniformity is None:
        return None
    words = (
        f"Two crops of an image lie {number(curve[-1][1])} apart (squared; 0 is the same, 2 "
        f"unrelated{_still(curve)}); uniformity is {number(uniformity)} (0 is one point, -4 a full "
        "sphere). Both falling is what training wants."
    )
    value = f"{number(curve[-1][1])} / {number(uniformity)}"
    return Finding("Alignment / uniformity", value, PLAIN, words, curve)


def _input(record: RunRecord) -> Finding | None:
    curve = record.curve("input_wait")
    if not curve:
        return None
    now = curve[-1][1]
    if now < STARVED:
        return None
    words = (
        f"{100 * now:.0f} % of the time goes into waiting for images: more input workers "
        "(--config.runtime.workers) or smaller files would make the run faster."
    )
    return Finding("Waiting for input", f"{100 * now:.0f} %", WATCH, words, curve)


def _files(record: RunRecord) -> Finding | None:
    count = int(record.last("unreadable_images") or 0)
    if not count:
        return None
    images = record.facts.get("images") or count
    words = (
        "1 file could not be read and took no part; it is named below."
        if count == 1
        else f"{count} files could not be read and took no part; they are named below."
    )
    status = WATCH if count > MANY * images else PLAIN
    return Finding("Unreadable files", str(count), status, words)
