"""The size of images that suits a network."""

from ml_collections import ConfigDict

IMAGENET = (
    256,
    224,
)  # short side and centre crop of the usual protocol; also configs/common.py's kNN
# Networks do well on images somewhat larger than the crops that they learned from: SwAV trains at
# 160 pixels and tests at 224.
LARGER = 1.5


def trained_size(run: ConfigDict | None) -> tuple[int, int]:
    """Short side and centre crop, in pixels, that suit the network of a pre-training run.

    They are those of the run's own kNN, `knn.resize` and `knn.crop`. Where these are the defaults,
    which suit only crops of about 224 pixels, they follow from the largest of `data.crop_size`.

    Args:
        run: config of the pre-training run; None for weights of unknown origin, which are taken
            for ImageNet's.
    """
    if run is None:
        return IMAGENET
    if (own := (run.knn.resize, run.knn.crop)) != IMAGENET:
        return own
    largest = max(run.data.crop_size)
    return IMAGENET if largest <= IMAGENET[1] <= LARGER * largest else with_margin(largest)


def with_margin(crop: int) -> tuple[int, int]:
    """A crop's side with the short side that has the usual margin around it."""
    return round(crop * IMAGENET[0] / IMAGENET[1]), crop
