"""The embedded labelled data set "collage": small scenes with exact labels, rendered locally.

A scene has a ground plane (grass or gravel), a backdrop (a brick wall or the sky), and three to
eight silhouettes (disk, square, triangle, star, ring, cross) that stand on the ground or hang in
the air. All textures are photographs. Labels are exact as scenes are rendered: visible instance
masks, panoptic ids, semantic classes and metric depth.

The photographs are part of the scikit-image wheel; nothing is downloaded. Only photographs that
scikit-image documents as CC0, public domain or without known restrictions are used:

=====================  =======================================  =====================
file                   subject, source                          licence
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

The two splits share no part of a photograph: textures of training scenes come from the left 65 % of
each, those of validation scenes from the rest.

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
