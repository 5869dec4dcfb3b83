"""What an evaluation says, in sentences for the person who decides about the line."""

from __future__ import annotations

from train.charts import percent
from train.figures import ClassFigures, Figures, Share


def counted(share: Share, parts: str) -> str:
    """``1 of 190 good parts (0.5%; 95% interval 0.1% to 2.9%)``."""
    low, high = share.interval
    shares = f"{percent(share.value)}; 95% interval {percent(low)} to {percent(high)}"
    return f"{share.hits} of {share.count} {parts} ({shares})"


def good_sentence(share: Share, declared: float) -> str:
    """How many good parts were rejected, beside the rate that was declared for the threshold."""
    low, high = share.interval
    text = f"Rejected {counted(share, 'good parts')}. "
    if low > declared:
        return text + (
            f"That is more than the declared {percent(declared)}: these parts are unlike those on which the threshold"
            " was set. Compare camera, light, fixture and supplier, and calibrate on parts of today."
        )
    if high > declared:
        return text + f"The declared rate of {percent(declared)} lies within that interval: nothing speaks against it."
    return text + f"That is less than the declared {percent(declared)}."


def caught_sentence(share: Share, classes: dict[str, ClassFigures]) -> str:
    """How many defective parts were caught, and where most were missed."""
    if not share.count:
        return "There are no defective parts in this test set: what the engine catches is not known."
    text = f"Caught {counted(share, 'defective parts')}."
    missed = {label: found.caught.count - found.caught.hits for label, found in classes.items() if found.caught}
    worst = max(missed, key=lambda label: missed[label])
    if not missed[worst]:
        return f"{text} None was missed."
    count = share.count - share.hits
    which = "all" if missed[worst] == count else str(missed[worst])
    return f"{text} Missed {count}{f', {which} of them {worst}' if len(missed) > 1 else ''}."


def order_sentence(auroc: float) -> str:
    """What the image AUROC says, whatever the threshold."""
    return (
        f"Whatever the threshold: of a random good and a random defective part, the defective one has the higher"
        f" score in {auroc:.1%} of cases."
    )


def sentences(figures: Figures, declared: float) -> list[str]:
    """The verdict on an engine: good parts rejected, defective ones caught, order of the scores.

    Args:
        figures: Measured with the engine's threshold.
        declared: The false-reject rate that was declared for that threshold.
    """
    caught = figures.defects_caught or Share(0, 0)
    found = [good_sentence(figures.good_rejected or Share(0, 0), declared), caught_sentence(caught, figures.classes)]
    return [*found, order_sentence(figures.values["image_auroc"])] if caught.count else found
