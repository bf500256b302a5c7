"""The embedded labelled data set "collage": small scenes with exact labels, made by this package.

A scene is a ground plane (grass or gravel) under a backdrop (a brick wall or the sky), with three
to eight silhouettes (disk, square, triangle, star, ring, cross) standing on the ground or hanging
in the air. All texture is photographic. Every label is exact because the scene is rendered from
it: visible instance masks, panoptic ids, semantic classes and metric depth.

The photographs are those that the scikit-image wheel itself carries; nothing is downloaded. Only
pictures that scikit-image documents as CC0, public domain or without known restrictions are used:

=====================  =======================================  =====================
file                   what, by whom                            licence
=====================  =======================================  =====================
astronaut.png          Eileen Collins, NASA                     public domain
brick.png              brick wall, CC0Textures "Bricks25"       CC0
camera.png             cameraman, Lav Varshney                  CC0
chelsea.png            a cat, Stefan van der Walt               CC0
clock_motion.png       a wall clock, Stefan van der Walt        public domain
coffee.png             a cup, Rachel Michetti                   CC0
coins.png              Greek coins, Brooklyn Museum             no known restrictions
grass.png              grass, DeviantArt "Grass 01" linolafett  CC0
gravel.png             gravel, CC0Textures "Gravel04"           CC0
hubble_deep_field.jpg  eXtreme Deep Field, NASA                 public domain
ihc.png                stained tissue, CMMI                     no known restrictions
retina.jpg             fundus, Mikael Häggström                 CC0
rocket.jpg             launch of DSCOVR, SpaceX                 public domain
=====================  =======================================  =====================

The two splits never show the same piece of a photograph: training scenes take their texture from
the left 65 % of every picture, validation scenes from the rest.

Shapes: H, W are the image height and width in pixels; lengths are metres unless named pixels.
"""

from __future__ import annotations

from .definition import (
    CLASSES,
    COLORS,
    COUNTS,
    SIZE,
    SPLITS,
    THING_CLASSES,
    VERSION,
)
from .scene import Scene, make_scene
from .write import collage_folder, write_collage

__all__ = [
    "CLASSES",
    "COLORS",
    "COUNTS",
    "SIZE",
    "SPLITS",
    "THING_CLASSES",
    "VERSION",
    "Scene",
    "collage_folder",
    "make_scene",
    "write_collage",
]
