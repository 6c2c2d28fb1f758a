"""A second clean view of each image: the control of equal passes."""

import dataclasses
from typing import ClassVar

from hexa_jax.views.base import Context, HardView, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra(HardView):
    """Other crops of the same images, augmented like the method's own; labels stay."""

    name: ClassVar[str] = "extra"
    scheme_name: ClassVar[str] = "extra"
    shows_clean_crop: ClassVar[bool] = False

    @property
    def crop_sets(self) -> int:
        return 1

    def make(self, context: Context) -> View:
        return View(context.new_crops(0))
