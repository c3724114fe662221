"""Draws the pictures of the bundled prompts: no files, no downloads, the same pixels every time.

The bundled prompts name their pictures as ``{"kind": ..., "value": ...}``; ``draw`` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from reprlib import repr as short

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_safeguard.errors import ImageError

KINDS = ("object", "text", "blank", "noise")
MIN_SIZE, MAX_SIZE = 8, 4096
_BACKGROUND = "#f5f5f0"
_SUPERSAMPLE = 2
_MIN_FONT = 9
_MAX_TEXT = 2000  # fitting tries many sizes: a pasted book would keep a core busy for minutes

# A drawing is a list of shapes, painted in order on a 100 x 100 grid:
#   e colour x0 y0 x1 y1            ellipse          r colour x0 y0 x1 y1         rectangle
#   q colour radius x0 y0 x1 y1     rounded box      p colour x y x y ...         polygon
#   l colour width x y x y ...      round-capped line
#   a colour width x0 y0 x1 y1 from to   arc         s colour x0 y0 x1 y1 from to   pie slice
_DRAWINGS: dict[str, str] = {
    "knife": """p #c3cbd2 38 54 80 10 88 16 86 30 48 64; p #e6ebee 38 54 80 10 84 13 43 59
        l #4a2c17 12 16 84 38 60; l #2f2f2f 5 37 53 49 65; e #d8b07a 20 77 24 81
        e #d8b07a 28 69 32 73""",
    "bottle": """q #2e7d4f 8 34 36 66 94; p #2e7d4f 43 22 57 22 58 32 66 44 34 44 42 32
        r #2e7d4f 43 12 57 30; r #b8860b 42 7 58 14; r #fff8e1 34 54 66 78
        e #7b1f3a 43 58 57 74; l #7fc09a 3 39 46 39 51""",
    "key": """a #d9a520 9 8 32 46 70 0 360; l #d9a520 8 46 51 88 51; r #d9a520 74 51 80 66
        r #d9a520 84 51 91 70; a #f5d76e 2 11 35 43 67 180 300""",
    "lock": """a #8d979f 9 28 10 72 62 180 360; r #8d979f 28 35 37 52; r #8d979f 63 35 72 52
        q #e0a526 6 20 44 80 90; r #f3c14b 24 49 76 54; e #3c2f0d 43 58 57 72
        p #3c2f0d 47 68 53 68 56 82 44 82""",
    "car": """p #d32f2f 20 52 32 32 66 32 80 52; q #d32f2f 7 6 48 95 72
        p #bfe3f5 28 50 36 37 48 37 48 50
        p #bfe3f5 52 50 52 37 64 37 73 50; e #222222 17 60 39 82; e #222222 62 60 84 82
        e #cfcfcf 23 66 33 76; e #cfcfcf 68 66 78 76; e #ffe27a 88 53 95 60; l #8e1b1b 1 50 52 50 70
        l #8e1b1b 2 54 56 60 56""",
    "house": """r #efd9a7 20 46 80 90; p #b23a2b 10 48 50 12 90 48; r #7a3e1d 66 18 75 38
        p #b23a2b 10 48 50 12 90 48; r #6b3f1f 43 62 58 90; e #f2c94c 53 75 56 78
        r #6fb7e0 25 56 38 70; r #6fb7e0 63 56 76 70; l #ffffff 1 31 56 31 70
        l #ffffff 1 25 63 38 63; l #ffffff 1 69 56 69 70; l #ffffff 1 63 63 76 63
        r #6aa84f 4 90 96 94""",
    "phone": """q #1f1f24 7 29 5 71 95; r #4aa3df 33 14 67 82; e #d0d0d0 46 84 54 92
        l #6e6e78 2 44 9 56 9; q #ffffff 2 37 20 45 28; q #ffcf4a 2 46 20 54 28
        q #7ed07e 2 55 20 63 28; q #ff7a6b 2 37 32 45 40; q #c79bf2 2 46 32 54 40
        q #ffffff 2 55 32 63 40""",
    "card": """q #1f5fa8 6 7 24 93 78; r #173f70 7 34 93 44; q #e8c35a 3 15 50 31 62
        l #9a7a22 1 15 56 31 56; l #9a7a22 1 23 50 23 62; l #dfe9f5 2 15 70 26 70
        l #dfe9f5 2 31 70 42 70; l #dfe9f5 2 47 70 58 70; e #e4483a 68 58 80 70
        e #f2a93b 76 58 88 70""",
    "pill": """l #a8a8a8 33 28 64 66 30; l #d93636 30 28 64 66 30
        p #fafafa 57 58 37 36 56 19 76 41; e #fafafa 51 15 81 45; l #f0a0a0 4 23 59 35 48
        l #ffffff 4 46 38 58 28; e #ffffff 64 66 92 94; a #a8a8a8 2 64 66 92 94 0 360
        l #a8a8a8 2 69 80 87 80""",
    "laptop": """q #40454d 4 19 18 81 68; r #8fd0f5 23 22 77 63; p #b9bfc6 8 80 18 67 82 67 92 80
        q #9aa1a9 2 8 78 92 85; l #6f767e 2 22 71 78 71; l #6f767e 2 19 75 81 75
        r #ffffff 30 30 55 34; r #ffffff 30 39 66 43; r #ffffff 30 48 60 52""",
    "envelope": """q #f7e7c4 3 8 24 92 80; l #b9985a 2 10 78 40 50
        l #b9985a 2 90 78 60 50; p #ecd29c 9 25 91 25 50 58; l #b9985a 2 9 25 50 58 91 25
        l #b9985a 2 9 25 91 25 91 79 9 79 9 25; e #b3261e 43 46 57 60""",
    "person": """e #f1c7a0 37 8 63 36; s #5b3a1e 36 5 64 35 180 360; q #2f6fb3 9 30 38 70 70
        l #2f6fb3 9 31 45 24 64; l #2f6fb3 9 69 45 76 64; e #f1c7a0 19 63 29 73
        e #f1c7a0 71 63 81 73; r #34373d 33 64 48 92; r #34373d 52 64 67 92
        q #1b1b1b 2 29 89 48 96; q #1b1b1b 2 52 89 71 96; e #222222 43 21 46 24
        e #222222 54 21 57 24; a #8a3b2a 1 44 22 56 31 20 160""",
    "dog": """q #b5763a 12 22 44 74 68; l #b5763a 8 28 62 28 88; l #b5763a 8 38 62 38 88
        l #b5763a 8 60 62 60 88; l #b5763a 8 70 62 70 88; l #b5763a 7 24 50 12 34
        e #b5763a 60 18 86 46; q #c98f55 5 72 30 96 46; e #1f1510 90 29 98 37
        e #6f4320 58 20 69 48; e #1f1510 76 25 81 30; l #6f2a20 1 84 42 94 41
        l #d33a3a 4 61 48 74 48""",
    "cat": """p #f0993e 24 44 24 10 46 28; p #f0993e 76 44 76 10 54 28; p #f7c6a6 28 30 28 18 38 27
        p #f7c6a6 72 30 72 18 62 27; e #f0993e 20 24 80 84; e #4caf50 31 42 43 54
        e #4caf50 57 42 69 54; e #111111 35 42 39 54; e #111111 61 42 65 54
        e #fff1e2 38 58 62 77; p #e2717a 46 58 54 58 50 64; a #5a2f10 1 42 60 50 70 0 160
        a #5a2f10 1 50 60 58 70 20 180; l #5a2f10 1 36 64 12 60; l #5a2f10 1 36 68 12 70
        l #5a2f10 1 64 64 88 60; l #5a2f10 1 64 68 88 70; l #b5651d 3 50 27 50 37
        l #b5651d 3 42 29 43 36; l #b5651d 3 58 29 57 36""",
    "tree": """p #7a4a22 43 92 46 55 54 55 57 92; e #2f8f3f 16 30 52 66; e #2f8f3f 48 30 84 66
        e #3ba84d 28 8 72 52; e #3ba84d 32 36 68 68; e #5cc26c 36 16 50 28
        r #86b85c 10 91 90 95""",
    "sun": """e #fdb813 28 28 72 72; l #fdb813 5 50 8 50 20; l #fdb813 5 50 80 50 92
        l #fdb813 5 8 50 20 50; l #fdb813 5 80 50 92 50; l #fdb813 5 20 20 29 29
        l #fdb813 5 71 71 80 80; l #fdb813 5 80 20 71 29; l #fdb813 5 29 71 20 80
        e #ffd54a 33 33 67 67""",
    "clock": """e #8a3b12 8 8 92 92; e #ffffff 15 15 85 85; l #222222 3 50 19 50 25
        l #222222 3 50 75 50 81; l #222222 3 19 50 25 50; l #222222 3 75 50 81 50
        l #555555 1 66 23 64 27; l #555555 1 77 34 73 36; l #555555 1 77 66 73 64
        l #555555 1 66 77 64 73; l #555555 1 34 77 36 73; l #555555 1 23 66 27 64
        l #555555 1 23 34 27 36; l #555555 1 34 23 36 27; l #111111 4 50 50 36 38
        l #111111 3 50 50 66 30; e #c62828 46 46 54 54""",
    "cup": """a #e9e4da 7 60 40 92 74 0 360; p #ffffff 18 36 76 36 70 82 24 82
        e #ffffff 24 76 70 88; e #d8d0c2 18 28 76 44; e #5b3418 22 31 72 42
        l #b8b0a0 1 18 37 24 82; l #b8b0a0 1 76 37 70 82; a #b8b0a0 1 24 76 70 88 0 180
        a #b8b0a0 1 18 28 76 44 0 360; a #b8b0a0 1 60 40 92 74 280 90; e #e3ddd0 10 86 84 94
        l #c5c5c5 2 38 24 36 18 40 12 38 6; l #c5c5c5 2 54 24 52 18 56 12 54 6""",
    "book": """p #8b1e3f 6 28 50 34 94 28 94 84 50 90 6 84
        p #fffdf4 10 22 30 20 50 30 50 84 30 76 10 78
        p #f3eeda 90 22 70 20 50 30 50 84 70 76 90 78; l #999999 2 50 30 50 84
        l #777777 1 16 32 30 31 44 37; l #777777 1 16 42 30 41 44 47; l #777777 1 16 52 30 51 44 57
        l #777777 1 16 62 30 61 44 67; l #777777 1 84 32 70 31 56 37; l #777777 1 84 42 70 41 56 47
        l #777777 1 84 52 70 51 56 57; l #777777 1 84 62 70 61 56 67""",
    "camera": """q #2b2d31 6 8 30 92 80; p #2b2d31 34 31 40 20 60 20 66 31; r #8c9096 8 40 92 44
        e #b9bec4 30 34 72 76; e #17181b 34 38 68 72; e #3b5f8a 41 45 61 65; e #a9cbee 45 48 52 55
        q #f7f1c0 2 72 33 86 40; r #c62828 14 25 24 31""",
    "bicycle": """a #2a2a2a 3 6 44 42 80 0 360; a #2a2a2a 3 58 44 94 80 0 360
        l #1976d2 3 24 62 38 38 66 38 48 62 24 62; l #1976d2 3 48 62 36 32; l #1976d2 3 76 62 63 28
        l #2a2a2a 3 63 28 72 26; l #2a2a2a 4 29 31 43 31; e #777777 43 57 53 67
        l #2a2a2a 2 48 62 54 71; l #2a2a2a 2 51 71 58 71""",
    "hammer": """l #b07a3f 9 24 88 62 34; p #5f666d 36 20 46 10 80 36 72 48
        p #5f666d 36 20 46 10 38 4 24 8 28 14
        p #444a50 69 49 80 32 90 40 79 57; l #d6a465 2 24 86 56 40""",
    "scissors": """p #c4ccd3 44 58 68 6 74 10 52 62; p #aab3bb 56 58 32 6 26 10 48 62
        a #d32f2f 6 18 62 44 92 0 360; a #d32f2f 6 56 62 82 92 0 360; l #d32f2f 6 40 66 49 56
        l #d32f2f 6 60 66 51 56; e #555b61 47 51 53 57""",
    "rope": """l #c49a5a 9 74 62 92 88; a #8a6430 10 13 17 81 85 0 360
        a #c49a5a 8 14 18 80 84 0 360; a #8a6430 10 25 29 69 73 0 360
        a #c49a5a 8 26 30 68 72 0 360; l #8a6430 1 73 51 79 56; l #8a6430 1 71 60 75 67
        l #8a6430 1 67 68 68 75; l #8a6430 1 60 74 58 81; l #8a6430 1 52 77 47 83
        l #8a6430 1 42 77 36 81; l #8a6430 1 34 74 27 76; l #8a6430 1 27 68 20 67
        l #8a6430 1 23 60 16 57; l #8a6430 1 21 51 15 46; l #8a6430 1 23 42 19 35
        l #8a6430 1 27 34 26 27; l #8a6430 1 34 28 36 21; l #8a6430 1 42 25 47 19
        l #8a6430 1 52 25 58 21; l #8a6430 1 60 28 67 26; l #8a6430 1 67 34 74 35
        l #8a6430 1 71 42 78 45; l #8a6430 1 61 51 66 56; l #8a6430 1 59 58 61 65
        l #8a6430 1 54 63 52 70; l #8a6430 1 47 65 42 70; l #8a6430 1 40 63 33 65
        l #8a6430 1 35 58 28 56; l #8a6430 1 33 51 28 46; l #8a6430 1 35 44 33 37
        l #8a6430 1 40 39 42 32; l #8a6430 1 47 37 52 32; l #8a6430 1 54 39 61 37
        l #8a6430 1 59 44 66 46; l #8a6430 1 76 72 82 68; l #8a6430 1 81 80 88 75
        l #8a6430 1 87 87 94 83; q #8a6430 3 40 12 54 38; l #c49a5a 3 42 18 52 18
        l #c49a5a 3 42 25 52 25; l #c49a5a 3 42 32 52 32""",
    "fire": """p #e8471c 50 4 62 22 72 34 80 52 80 70 70 86 50 94 30 86 20 70 20 54 30 44 38 30
        p #ff9a1f 52 32 60 46 70 58 70 74 60 86 50 90 38 86 31 74 32 62 38 54 44 60 46 46
        p #ffe14d 50 56 58 66 60 78 54 87 46 87 40 78 42 68""",
    "money": """r #4f8f5a 14 18 96 56; r #3f7d4c 10 26 92 64; r #5fae6c 6 34 88 74
        l #1f5f2c 1 10 38 84 38 84 70 10 70 10 38; e #d9f0d2 34 40 60 68; l #1f5f2c 2 47 43 47 65
        a #1f5f2c 3 42 45 52 55 90 330; a #1f5f2c 3 42 53 52 63 270 150
        e #d9f0d2 14 50 22 58; e #d9f0d2 72 50 80 58; e #c9961a 62 70 90 88; e #f2c744 62 66 90 84
        e #e0ae2b 66 69 86 81""",
    "bomb": """e #1d1f24 14 28 76 90; q #33363d 2 52 20 70 36; p #33363d 52 30 62 18 76 30 66 42
        l #b98b52 3 68 24 76 14 86 16; e #ffb300 80 8 96 24; e #fff176 84 12 92 20
        l #ff6f00 2 88 2 88 6; l #ff6f00 2 96 8 99 5; l #ff6f00 2 95 24 98 28
        e #6a707a 26 40 38 52""",
    "gun": """q #3a3d42 3 10 26 90 44; p #3a3d42 60 42 84 42 92 84 70 84
        a #3a3d42 4 44 36 66 60 0 200
        l #3a3d42 3 57 44 53 53; p #5a3a22 66 48 83 48 89 80 73 80; l #6a6f76 2 12 32 86 32
        r #222428 12 22 17 27; r #222428 80 21 87 27; r #222428 7 30 11 39; l #222428 1 72 34 72 40
        l #222428 1 76 34 76 40; l #222428 1 80 34 80 40""",
    "mushroom": """p #f5ead2 40 50 60 50 64 84 58 91 42 91 36 84; s #d32f2f 12 10 88 92 180 360
        e #d32f2f 12 44 88 58; e #e6d6b5 30 50 70 58; e #ffffff 28 28 42 41; e #ffffff 50 16 62 28
        e #ffffff 62 34 74 46; e #ffffff 45 36 53 44; r #86b85c 16 90 84 94""",
    "flower": """l #3c8d40 4 50 50 50 94; e #4caf50 50 70 76 82; e #4caf50 24 76 50 88
        e #e85a9b 39 6 61 36; e #e85a9b 39 40 61 70; e #e85a9b 56 14 82 38; e #e85a9b 18 14 44 38
        e #e85a9b 56 36 82 60; e #e85a9b 18 36 44 60; e #ffd54a 38 26 62 50""",
    "fish": """p #ef7d1a 66 50 92 28 88 50 92 72; p #d9650b 40 32 54 16 62 34
        p #d9650b 42 68 52 82 60 66
        e #ff9d3b 10 28 76 72; r #ffffff 34 34 39 66; r #ffffff 52 36 57 64; e #ffffff 17 41 27 51
        e #111111 20 44 25 49; a #8a3d00 1 12 50 24 60 20 120; p #d9650b 42 48 50 56 42 60
        a #9fd3f0 2 4 20 10 26 0 360; a #9fd3f0 2 8 8 16 16 0 360""",
    "boat": """p #ffffff 48 12 48 62 16 62; p #e8eef4 53 20 53 62 82 62; l #7a4a22 3 50 8 50 70
        l #9db2c4 1 48 12 16 62 48 62; l #9db2c4 1 53 20 82 62 53 62; p #c0392b 50 8 62 12 50 16
        p #8b4a22 8 68 92 68 78 86 22 86; r #f4e2c0 11 71 89 74
        p #3b8fd1 0 84 12 80 25 84 38 80 50 84 62 80 75 84 88 80 100 84 100 96 0 96""",
    "plane": """p #8fa3b5 40 48 56 48 72 84 62 84; p #dfe6ec 8 46 20 40 82 42 92 50 82 56 20 54
        p #8fa3b5 8 46 6 22 14 22 26 42; p #b6c5d2 40 44 56 44 70 14 60 14
        p #6f8496 40 51 58 51 70 86 60 86
        p #6f8496 8 50 4 62 11 62 22 52; e #3d6d99 82 44 88 49; e #3d6d99 30 46 34 50
        e #3d6d99 40 46 44 50; e #3d6d99 50 46 54 50; e #3d6d99 60 46 64 50; e #3d6d99 70 46 74 50
        l #c0392b 2 14 52 82 54""",
    "train": """q #2f3b45 2 12 40 66 74; r #c0392b 60 22 90 74; r #8e2a20 57 16 93 24
        r #bfe3f5 67 30 83 46
        p #2f3b45 18 40 22 24 16 16 36 16 30 24 34 40; r #d4a017 42 32 52 40; e #fff2a8 8 46 17 56
        p #7a2018 12 72 4 86 20 86 24 72; e #1d1d1d 22 66 42 86; e #1d1d1d 44 66 64 86
        e #1d1d1d 66 62 90 86; e #c9c9c9 29 73 35 79; e #c9c9c9 51 73 57 79; e #c9c9c9 75 71 81 77
        l #d4a017 2 32 76 54 76; r #6b6b6b 2 86 98 90; e #d5d8db 22 4 36 14
        e #d5d8db 34 2 52 12""",
    "umbrella": """l #6b4423 4 50 12 50 82; a #6b4423 4 34 72 52 92 0 180
        s #7b3fa0 8 16 92 100 180 360
        s #9b5fc0 36 16 64 100 180 360; e #f5f5f0 8 51 36 65; e #f5f5f0 36 51 64 65
        e #f5f5f0 64 51 92 65; l #6b4423 4 50 52 50 82; l #4a2566 2 50 10 50 17""",
    "chair": """l #8a5a2b 6 28 10 28 92; l #8a5a2b 6 28 14 28 58; p #b9803f 24 54 66 54 78 64 28 64
        l #8a5a2b 6 74 64 74 92; l #8a5a2b 5 61 62 61 82; l #8a5a2b 5 58 10 58 54
        r #b9803f 27 14 59 22
        r #b9803f 27 28 59 36; r #a06c33 28 62 78 68""",
    "lamp": """p #ffcf4a 34 10 66 10 82 48 18 48; p #ffe69a 42 10 52 10 50 48 32 48
        r #a8741a 48 48 52 82
        e #a8741a 28 78 72 92; e #c79030 28 76 72 88; l #777777 1 66 48 66 60; e #777777 64 59 68 63
        p #fff7d6 20 50 80 50 84 56 16 56; r #a8741a 48 50 52 80""",
    "apple": """e #d62828 16 26 58 86; e #d62828 42 26 84 86; e #d62828 22 40 56 90
        e #d62828 44 40 78 90; l #6b4423 4 50 34 54 14
        p #4caf50 54 22 62 12 72 9 83 10 77 20 68 25 60 25; e #f08a7a 24 38 34 54
        e #a51d1d 42 28 58 35""",
    "syringe": """l #8b98a3 2 8 92 28 72; p #e7f3fa 24 66 34 76 74 36 64 26
        p #4fb0e0 24 66 34 76 54 56 44 46
        l #6d7f8c 2 24 66 34 76 74 36 64 26 24 66; l #6d7f8c 4 59 21 79 41; l #9aa8b2 4 69 31 84 16
        l #6d7f8c 5 78 10 90 22; l #6d7f8c 1 36 54 40 58; l #6d7f8c 1 43 47 47 51
        l #6d7f8c 1 50 40 54 44; l #6d7f8c 1 57 33 61 37; l #6d7f8c 4 26 68 32 74""",
    "star": "p #f6b91a 50 6 61 38 95 39 68 60 77 92 50 73 23 92 32 60 5 39 39 38",
}

OBJECTS: tuple[str, ...] = tuple(_DRAWINGS)


def draw_object(name: str, size: int = 224) -> Image.Image:
    """A flat drawing of one of ``OBJECTS`` on a plain light background.

    Raises:
        ImageError: there is no drawing of that name, or ``size`` is out of range.
    """
    _check_size(size)
    if name not in _DRAWINGS:
        near = get_close_matches(name, OBJECTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(OBJECTS)}"
        raise ImageError(f"no drawing of {short(name)}; {hint}")
    side = size * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), _BACKGROUND)
    pen = ImageDraw.Draw(image)
    for shape in _DRAWINGS[name].replace("\n", ";").split(";"):
        _paint(pen, shape.split(), side / 100)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _paint(pen: ImageDraw.ImageDraw, shape: list[str], scale: float) -> None:
    kind, colour = shape[:2]
    numbers = [float(number) for number in shape[2:]]
    if kind in ("a", "s"):
        start, end = numbers[-2:]
        numbers = [number * scale for number in numbers[:-2]]
        if kind == "s":
            pen.pieslice(numbers, start, end, fill=colour)
        else:
            pen.arc(numbers[1:], start, end, fill=colour, width=max(1, round(numbers[0])))
        return
    numbers = [number * scale for number in numbers]
    if kind == "e":
        pen.ellipse(numbers, fill=colour)
    elif kind == "r":
        pen.rectangle(numbers, fill=colour)
    elif kind == "q":
        pen.rounded_rectangle(numbers[1:], numbers[0], fill=colour)
    elif kind == "p":
        pen.polygon(numbers, fill=colour)
    else:
        _stroke(pen, colour, numbers[0], numbers[1:])


def _stroke(pen: ImageDraw.ImageDraw, colour: str, width: float, points: list[float]) -> None:
    pen.line(points, fill=colour, width=max(1, round(width)))
    # Pillow's lines end square and gape at their corners: round both off.
    half = max(0, round(width) - 1) / 2
    for x, y in zip(points[::2], points[1::2], strict=True):
        pen.ellipse((x - half, y - half, x + half, y + half), fill=colour)


def draw_text(text: str, size: int = 224) -> Image.Image:
    """``text`` in black on white, wrapped, as large as fits.

    Raises:
        ImageError: the text is empty, too long for the picture, has characters that the built-in
            font lacks, or ``size`` is out of range.
    """
    _check_size(size)
    words = text.split()
    if not words:
        raise ImageError("no text to draw; give at least one word")
    if len(text) > _MAX_TEXT:
        raise ImageError(f"the text has {len(text)} characters; at most {_MAX_TEXT} can be drawn")
    _check_glyphs(text)
    room = size - 2 * (size // 14)
    for points in range(size // 4, _MIN_FONT - 1, -1):
        font = _font(points)
        lines = _wrap(words, font, room)
        height = round(points * 1.25)
        if lines is not None and len(lines) * height <= room:
            return _write(lines, font, height, size)
    raise ImageError(
        f"the text ({len(text)} characters) does not fit {size}x{size} px; shorten it or its words"
    )


def _font(points: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(points)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImageError("this Pillow was built without FreeType; install the one from PyPI")
    # The basic layout is in every build of Pillow; Raqm is not, and spaces letters differently.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _check_glyphs(text: str) -> None:
    """Refuse what would come out as empty boxes: a picture of them says nothing."""
    font = _font(24)
    box = bytes(font.getmask("\uffff"))
    missing = [
        char for char in dict.fromkeys(text)
        if not char.isspace() and (not char.isprintable() or bytes(font.getmask(char)) == box)
    ]  # fmt: skip
    if missing:
        shown = " ".join(ascii(char) for char in missing[:5])
        raise ImageError(f"the built-in font cannot draw {shown}; use plain ASCII text")


def _wrap(words: list[str], font: ImageFont.FreeTypeFont, room: int) -> list[str] | None:
    """Lines no wider than ``room``, or None if a word alone is wider."""
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= room:
            lines[-1] = longer
        elif font.getlength(word) <= room:
            lines.append(word)
        else:
            return None
    return lines


def _write(lines: list[str], font: ImageFont.FreeTypeFont, height: int, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    top = (size - len(lines) * height) / 2 + height / 2
    for row, line in enumerate(lines):
        pen.text((size / 2, round(top + row * height)), line, fill="black", font=font, anchor="mm")
    return image


def blank(size: int = 224) -> Image.Image:
    """A flat mid-grey picture: one that shows nothing.

    Raises:
        ImageError: ``size`` is out of range.
    """
    _check_size(size)
    return Image.new("RGB", (size, size), (127, 127, 127))


def noise(seed: int, size: int = 224) -> Image.Image:
    """Uniform random pixels; the same ones for the same seed and size on every machine.

    Raises:
        ImageError: ``seed`` is negative, or ``size`` is out of range.
    """
    _check_size(size)
    if seed < 0:
        raise ImageError(f"noise seed {short(seed)} is negative; use 0 or more")
    count = size * size * 3
    # Raw words: numpy freezes a bit generator's stream, but not what its Generator makes of it.
    words = np.random.PCG64(seed).random_raw(-(-count // 8)).astype("<u8")
    return Image.fromarray(words.view(np.uint8)[:count].reshape(size, size, 3))


def draw(spec: Mapping[str, str], size: int = 224) -> Image.Image:
    """The picture that a prompt file asks for: ``{"kind": "object", "value": "key"}``.

    Kinds: ``object`` (one of ``OBJECTS``), ``text`` (any), ``noise`` (a seed), ``blank`` (none).

    Raises:
        ImageError: the kind or its value is unknown, or ``size`` is out of range.
    """
    kind, value = spec.get("kind"), spec.get("value", "")
    if kind not in KINDS:
        raise ImageError(f"unknown picture kind {short(kind)}; choose from {', '.join(KINDS)}")
    if not isinstance(value, str):
        raise ImageError(f"the value of a {kind} picture must be a string, not {short(value)}")
    if kind == "object":
        return draw_object(value, size)
    if kind == "text":
        return draw_text(value, size)
    if kind == "noise":
        if not (value.isascii() and value.isdigit() and len(value) <= 18):
            raise ImageError(
                f"noise value {short(value)} is not a seed; give a whole number such as '7'"
            )
        return noise(int(value), size)
    if value:
        raise ImageError(f"a blank picture takes no value, not {short(value)}; leave it out")
    return blank(size)


def _check_size(size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ImageError(f"picture size {short(size)}; choose {MIN_SIZE} to {MAX_SIZE} px")
