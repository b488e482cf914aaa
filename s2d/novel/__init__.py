"""Novel cameras: where pseudo views are made, and in which order they are reached.

`make_novel_cameras` is what stage 0 calls; `rounds` is how stages 2 and 3 go outward in several rounds.
"""

from s2d.novel.choose import NovelMode, make_novel_cameras
from s2d.novel.top_view import draw_top_view

__all__ = ["NovelMode", "draw_top_view", "make_novel_cameras"]
