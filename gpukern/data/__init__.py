"""The input pipeline of image classification: augmentation, batches, statistics, mixtures."""

from gpukern.data.augment import Augment
from gpukern.data.loader import Loader
from gpukern.data.mixing import mixup, smooth_labels
from gpukern.data.statistics import channel_statistics, mean_image

__all__ = ["Augment", "Loader", "channel_statistics", "mean_image", "mixup", "smooth_labels"]
