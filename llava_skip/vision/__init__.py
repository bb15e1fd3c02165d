"""The vision tower and the front ends: an image's visual tokens, the retained ones first."""

from llava_skip.vision.cos import ChainOfSightFrontEnd
from llava_skip.vision.front_end import FrontEnd, get_front_end, register_front_end
from llava_skip.vision.hd import HdFrontEnd
from llava_skip.vision.llava import LlavaFrontEnd

__all__ = ["FrontEnd", "get_front_end", "register_front_end"]

for _front_end in (LlavaFrontEnd(), HdFrontEnd(), ChainOfSightFrontEnd()):
    register_front_end(_front_end)
