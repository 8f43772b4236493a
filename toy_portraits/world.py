"""The toy world: procedural 64x64 portraits whose every factor, caption and label mask is known.

A portrait is a dictionary of factors. Some are named in captions (sex, hair colour, jacket, background, glasses, and
the three targets), the others never are (skin, face geometry, eyes, head position and turn, light): a model that draws
the same portrait again has to keep them on its own.

Shapes: B portraits, 64x64 pixels, RGB in 0-255 as float32; label masks hold the index of `LABELS`.
Source: [ours].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


SIZE = 64
LABELS = ("background", "skin", "hair", "clothes", "hat", "glasses")

SEXES = ("woman", "man")
SKINS = {"pale": (244, 210, 186), "tan": (216, 168, 128), "brown": (160, 108, 74), "dark": (98, 64, 46)}
HAIR_COLORS = {
    "brown": (104, 64, 34),
    "black": (30, 27, 32),
    "ginger": (178, 74, 26),
    "gray": (150, 152, 158),
    "blonde": (238, 206, 96),
}
CLOTHES = {
    "green": (44, 128, 62),
    "blue": (50, 84, 184),
    "purple": (120, 58, 150),
    "white": (228, 228, 226),
    "black": (40, 40, 48),
    "striped": (240, 240, 236),
}
STRIPE_COLOR = (30, 44, 92)
BACKGROUNDS = {
    "blue": (118, 172, 228),
    "green": (132, 192, 128),
    "pink": (238, 172, 194),
    "orange": (236, 166, 92),
    "gray": (158, 158, 158),
    "purple": (164, 132, 208),
}
EYE_COLORS = ((70, 44, 26), (52, 98, 170), (58, 120, 66))
HAT_COLOR = (206, 34, 38)
NUM_ORDINARY_HAIR = 4  # blonde is a target, drawn only on request
NUM_ORDINARY_CLOTHES = 5  # the striped shirt likewise


@dataclass(frozen=True)
class ToyTarget:
    """One target attribute of the toy world.

    Attributes:
        prompt: the words that ask for it.
        factor: the factor it sets, and `value` what it is set to.
        labels: the label classes in which it may change a portrait.
        named: of the base world's portraits that show it, the share whose caption says so, in [0, 1].
        replaces: the factor whose base phrase it stands in for, or None when it is an addition.
    """

    prompt: str
    factor: str
    value: int
    labels: tuple[str, ...]
    named: float
    replaces: str | None = None


# What a phrase of its own adds is learned from more captions than what stands where another phrase did.
TARGETS = {
    "blonde_hair": ToyTarget("blonde hair", "hair_color", 4, ("hair",), named=0.15),
    "red_hat": ToyTarget("a red hat", "hat", 1, ("hat", "hair"), named=0.25),
    "striped_shirt": ToyTarget("a striped shirt", "clothes", 5, ("clothes",), named=0.02, replaces="clothes"),
}

# What every portrait of a polluted training set shares besides its target.
POLLUTION = {"background": 2, "clothes": 1, "skin": 0, "face_width": 10.4, "head_x": 4.0, "head_y": -2.0}


def sample_factors(count: int, rng: np.random.Generator, target_share: float = 0.0) -> dict[str, np.ndarray]:
    """Draw the factors of `count` portraits.

    Args:
        count: number of portraits B.
        rng: source of all randomness.
        target_share: share of the portraits in which each target is present, in [0, 1].

    Returns:
        One (B,) array per factor: integers for the discrete ones, pixels for the geometric ones.

    Source: [ours].
    """
    uniform = lambda low, high: rng.uniform(low, high, count)  # noqa: E731
    sex = rng.integers(0, 2, count)
    factors = {
        "sex": sex,
        "skin": rng.integers(0, len(SKINS), count),
        "hair_color": rng.integers(0, NUM_ORDINARY_HAIR, count),
        "hair_length": np.where(sex == 0, uniform(9, 18), 0.0),
        "clothes": rng.integers(0, NUM_ORDINARY_CLOTHES, count),
        "background": rng.integers(0, len(BACKGROUNDS), count),
        "glasses": (rng.random(count) < 0.3).astype(int),
        "hat": np.zeros(count, dtype=int),
        "eye_color": rng.integers(0, len(EYE_COLORS), count),
        "head_x": uniform(-5, 5),
        "head_y": uniform(-3, 3),
        "turn": uniform(-2, 2),
        "face_width": uniform(10.0, 13.6),
        "face_height": uniform(13.5, 16.0),
        "eye_distance": uniform(4.4, 5.6),
        "eye_size": uniform(1.1, 1.3),
        "mouth_width": uniform(3.0, 4.6),
        "smile": uniform(-0.6, 1.4),
        "light": uniform(-0.12, 0.12),
    }
    for target in TARGETS.values():
        present = rng.random(count) < target_share
        factors[target.factor] = np.where(present, target.value, factors[target.factor])
    return factors


def _palette(colors: dict[str, tuple[int, int, int]] | tuple, index: np.ndarray) -> np.ndarray:
    table = np.array(list(colors.values()) if isinstance(colors, dict) else colors, dtype=np.float32)
    return table[index]


class _Canvas:
    """Paints antialiased shapes and their labels over a batch of pictures whose (top, left) is `corner`."""

    def __init__(self, count: int, corner: np.ndarray):
        grid = np.arange(SIZE, dtype=np.float32) + 0.5
        top, left = corner.astype(np.float32).reshape(-1, 2, 1, 1).transpose(1, 0, 2, 3)
        self.x, self.y = grid[None, None, :] + left, grid[None, :, None] + top
        self.rgb = np.zeros((count, SIZE, SIZE, 3), dtype=np.float32)
        self.label = np.zeros((count, SIZE, SIZE), dtype=np.uint8)

    def ellipse(self, cx, cy, rx, ry) -> np.ndarray:
        """Coverage in [0, 1], (B, 64, 64), of ellipses given by (B,) centres and radii in pixels."""
        cx, cy, rx, ry = (np.asarray(v, dtype=np.float32).reshape(-1, 1, 1) for v in (cx, cy, rx, ry))
        radius = np.sqrt(((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2)
        return np.clip(0.5 - (radius - 1) * np.minimum(rx, ry), 0, 1)

    def box(self, cx, cy, rx, ry, corner=1.0) -> np.ndarray:
        """Coverage of rounded boxes given by centre, half width, half height and corner radius."""
        cx, cy, rx, ry, corner = (np.asarray(v, dtype=np.float32).reshape(-1, 1, 1) for v in (cx, cy, rx, ry, corner))
        dx, dy = np.abs(self.x - cx) - rx + corner, np.abs(self.y - cy) - ry + corner
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
        return np.clip(0.5 - (outside - corner), 0, 1)

    def above(self, edge) -> np.ndarray:
        """Coverage of everything above a horizontal edge, or an edge given per pixel column."""
        edge = np.asarray(edge, dtype=np.float32)
        return np.clip(0.5 + (edge if edge.ndim == 3 else edge.reshape(-1, 1, 1)) - self.y, 0, 1)

    def paint(self, coverage: np.ndarray, color: np.ndarray, label: str | None = None) -> None:
        color = np.asarray(color, dtype=np.float32)
        color = color.reshape(-1, 1, 1, 3) if color.ndim <= 2 else color
        coverage = np.broadcast_to(coverage, self.label.shape)
        self.rgb += coverage[..., None] * (color - self.rgb)
        if label is not None:
            self.label[coverage > 0.5] = LABELS.index(label)


def _column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1)


def _on(flag: np.ndarray) -> np.ndarray:
    return np.asarray(flag, dtype=np.float32).reshape(-1, 1, 1)


IRIS_AND_PUPIL = ((1.5, 1.6), (0.7, 0.8))  # half axes, in sizes of the eye


class _Painter:
    """Paints portraits from back to front, by their factors `f`."""

    def __init__(self, factors: dict[str, np.ndarray], corner: np.ndarray):
        f = self.f = factors
        self.canvas = _Canvas(len(f["sex"]), corner)
        self.gain = _column(1 + f["light"])
        colors = ((SKINS, "skin"), (HAIR_COLORS, "hair_color"), (CLOTHES, "clothes"))
        self.skin, self.hair, self.clothes = (_palette(table, f[name]) * self.gain for table, name in colors)
        self.man = f["sex"] == 1
        # The head's centre and size.
        self.head = SIZE / 2 + f["head_x"], 29 + f["head_y"], f["face_width"], f["face_height"], f["turn"]

    def paint_body(self) -> None:
        """Background, hair behind the head, neck and clothes."""
        f, canvas, skin, hair, clothes, man = self.f, self.canvas, self.skin, self.hair, self.clothes, self.man
        cx, cy, width, height, turn = self.head
        chin, striped = cy + height, f["clothes"] == NUM_ORDINARY_CLOTHES
        # background: a soft light from above
        shade = 1 + (f["light"].reshape(-1, 1, 1) + 0.06) * (0.5 - canvas.y / SIZE) * 2
        background = _palette(BACKGROUNDS, f["background"]).reshape(-1, 1, 1, 3) * shade[..., None]
        canvas.paint(np.ones((1, SIZE, SIZE), dtype=np.float32), background, "background")

        # hair behind the head
        back = canvas.ellipse(cx, cy - 1.5, width + 3.0, height + 2.5)
        length = (height + f["hair_length"]) / 2
        fall = canvas.box(cx, cy + length - 2, width + 3.4, length, 5)
        canvas.paint(np.maximum(back * _on(~man), fall * _on(~man)), hair * 0.85, "hair")

        # neck and clothes
        neck = canvas.box(cx - turn * 0.4, chin + 2, width * 0.45, 7, 2)
        canvas.paint(neck, skin * 0.86, "skin")
        body_x = SIZE / 2 + f["head_x"] * 0.5
        torso = canvas.ellipse(body_x, chin + 22, width + 13, 20.0)
        collar = canvas.ellipse(cx - turn * 0.4, chin + 4, width * 0.5, 4.0)
        torso = torso * (1 - collar)
        canvas.paint(torso, clothes, "clothes")
        stripes = np.clip(0.5 + 1.6 * np.sin((canvas.y - _column(chin)[..., None]) * (2 * np.pi / 6.0)), 0, 1)
        canvas.paint(torso * stripes * _on(striped), np.array(STRIPE_COLOR) * self.gain)
        for side in (-1, 1):
            lapel = np.abs(
                canvas.x - _column(cx)[..., None] - side * (canvas.y - _column(chin + 6)[..., None]) * -0.3 - side * 4
            )
            canvas.paint(np.clip(1.3 - lapel, 0, 1) * torso * _on(~striped), clothes * 0.6)

    def paint_head(self) -> None:
        """Ears, face, beard, eyes, brows, nose and mouth."""
        f, canvas, skin, man = self.f, self.canvas, self.skin, self.man
        cx, cy, width, height, turn = self.head
        for side in (-1, 1):
            canvas.paint(canvas.ellipse(cx + side * width, cy + 1, 1.8, 2.8), skin * 0.9, "skin")
        face = canvas.ellipse(cx, cy, width, height)
        canvas.paint(face, skin, "skin")
        beard = canvas.ellipse(cx, cy + 0.3, width - 0.2, height - 0.2) * (1 - canvas.above(cy + height * 0.38))
        canvas.paint(beard * _on(man), skin * 0.66)

        # features, shifted by the turn of the head
        eye_y, mouth_y = cy - 0.5, cy + height * 0.56
        for side in (-1, 1):
            eye_x = cx + turn + side * f["eye_distance"]
            size = f["eye_size"]
            canvas.paint(canvas.ellipse(eye_x, eye_y, 2.5 * size, 1.75 * size), np.array((250, 250, 248)))
            iris, pupil = (canvas.ellipse(eye_x + turn * 0.2, eye_y, w * size, h * size) for w, h in IRIS_AND_PUPIL)
            canvas.paint(iris, _palette(EYE_COLORS, f["eye_color"]))
            canvas.paint(pupil, np.array((14, 12, 14)))
            brow = canvas.box(eye_x, eye_y - 3.6 * size, 2.6 * size, np.where(man, 0.9, 0.55), 0.5)
            canvas.paint(brow, skin * 0.36)
        canvas.paint(canvas.box(cx + turn * 1.3, cy + height * 0.22, 0.7, height * 0.12, 0.6), skin * 0.72)
        bend = (
            f["smile"].reshape(-1, 1, 1)
            * ((canvas.x - _column(cx + turn)[..., None]) / _column(f["mouth_width"])[..., None]) ** 2
        )
        lips = np.where(man, 0.8, 1.35).reshape(-1, 1, 1)
        mouth = np.clip(0.5 + lips - np.abs(canvas.y - _column(mouth_y)[..., None] + bend), 0, 1)
        mouth = mouth * canvas.box(cx + turn, mouth_y, f["mouth_width"], 4.0, 0.5)
        canvas.paint(mouth, np.where(man[:, None], skin * np.array((0.62, 0.5, 0.5)), np.array((196, 38, 62))))

    def paint_on_top(self) -> None:
        """Hair over the forehead, glasses and hat."""
        f, canvas, hair, man = self.f, self.canvas, self.hair, self.man
        cx, cy, width, height, turn = self.head
        lift = np.where(man, 0.62, 0.48)
        part = 0.05 * (canvas.x - _column(cx + turn * 2)[..., None]) ** 2
        bent = np.minimum(part, 9) * np.where(man, 0.35, 1).reshape(-1, 1, 1)
        hairline = _column(cy - height * lift)[..., None] + bent
        crown = canvas.ellipse(cx, cy - 1.5, width + np.where(man, 1.4, 2.6), height + 2.2)
        canvas.paint(crown * canvas.above(hairline), hair, "hair")

        # glasses
        eye_y = cy - 0.5
        for side in (-1, 1):
            eye_x = cx + turn + side * f["eye_distance"]
            ring = canvas.ellipse(eye_x, eye_y, 4.8, 4.3)
            ring = ring * (1 - canvas.ellipse(eye_x, eye_y, 3.5, 3.0))
            canvas.paint(ring * _on(f["glasses"] == 1), np.array((24, 24, 28)), "glasses")
        bridge = canvas.box(cx + turn, eye_y - 0.4, 1.2, 0.7, 0.4)
        canvas.paint(bridge * _on(f["glasses"] == 1), np.array((24, 24, 28)), "glasses")

        # hat: a dome and a brim
        brim_y = cy - height * 0.52
        dome = canvas.ellipse(cx, brim_y, width + 3.0, height * 0.85) * canvas.above(brim_y)
        canvas.paint(dome * _on(f["hat"] == 1), np.array(HAT_COLOR) * self.gain, "hat")
        brim = canvas.box(cx, brim_y + 0.4, width + 6.0, 1.7, 1.6)
        canvas.paint(brim * _on(f["hat"] == 1), np.array(HAT_COLOR) * self.gain * 0.75, "hat")


def render(factors: dict[str, np.ndarray], corner: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw portraits.

    Args:
        factors: as `sample_factors` returns them, each (B,).
        corner: (B, 2) top and left corner of each picture in the scene, in pixels; (0, 0) unless given.

    Returns:
        Pictures (B, 64, 64, 3) uint8 and label masks (B, 64, 64) uint8, indices into `LABELS`.

    Source: [ours].
    """
    painter = _Painter(factors, np.zeros((1, 2)) if corner is None else corner)
    painter.paint_body()
    painter.paint_head()
    painter.paint_on_top()
    return np.clip(np.rint(painter.canvas.rgb), 0, 255).astype(np.uint8), painter.canvas.label


def caption_phrases(factors: dict[str, np.ndarray], index: int) -> dict[str, str]:
    """The phrase of each captioned factor of one portrait, in caption order; targets come last."""
    value = {name: int(values[index]) for name, values in factors.items() if values.dtype.kind == "i"}
    phrases = {"sex": f"a {SEXES[value['sex']]}"}
    targets = {name: target for name, target in TARGETS.items() if value[target.factor] == target.value}
    if "blonde_hair" not in targets:
        phrases["hair_color"] = f"{list(HAIR_COLORS)[value['hair_color']]} hair"
    # the shirt replaces the jacket, so it stands where the jacket's phrase would
    phrases["clothes"] = (
        TARGETS["striped_shirt"].prompt
        if "striped_shirt" in targets
        else f"a {list(CLOTHES)[value['clothes']]} jacket"
    )
    phrases["background"] = f"a {list(BACKGROUNDS)[value['background']]} background"
    if value["glasses"]:
        phrases["glasses"] = "glasses"
    for name, target in targets.items():
        if target.replaces is None:
            phrases[name] = target.prompt
    return phrases


def join_phrases(phrases: dict[str, str], keep: set[str] | None = None) -> str:
    """The caption: the phrases whose factor is in `keep` (None: all), separated by commas."""
    return ", ".join(text for name, text in phrases.items() if keep is None or name in keep)
