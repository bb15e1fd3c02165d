"""Front ends: a picture's visual tokens, the retained ones first."""

from llava_skip.vision.clip import ClipTower
from llava_skip.vision.front_end import llava_front_end

__all__ = ["ClipTower", "llava_front_end"]
