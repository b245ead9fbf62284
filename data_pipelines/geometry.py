"""The shape of rows, and how documents are laid out in them: what planning and building must agree on."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Fixed for a run.

    Raises:
      ValueError: when an image could not stand in any row.
    """

    row_length: int  # S: positions of a row
    positions: int  # P: decoder positions of an image
    per_row: int  # I: image slots of a row; 0 when documents have no images
    size: int  # pixels, height and width of a built image
    image_delimiters: bool = False  # boi and eoi, one position each, around every image
    image_attention: str = "bidirectional"  # bidirectional | causal
    image_rotary: str = "sequential"  # sequential | shared
    caption_order: str = "image_first"  # image_first | text_first | random
    # One image and its text a row. Not in the repr, which stands in the fingerprint of packed streams; the fingerprints
    # of plans tell (packing_key).
    pairs: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self):
        if self.row_length < 2:
            raise ValueError(f"row_length = {self.row_length}; a row needs at least 2 positions")
        if self.pairs and (self.positions or self.per_row != 1 or self.image_delimiters or self.row_length < 3):
            raise ValueError(
                "data.rows = 'pairs' has one image a row, beside the text: image.positions = 0, image.per_row = 1, "
                f"data.image_delimiters off and row_length at least 3, not {self.positions}, {self.per_row}, "
                f"{self.image_delimiters} and {self.row_length}"
            )
        if self.per_row and self.image_span > self.row_length:
            raise ValueError(
                f"an image takes {self.image_span} positions (image.positions = {self.positions}, image delimiters "
                f"{'on' if self.image_delimiters else 'off'}) and fits no row of row_length = {self.row_length}; "
                "make rows longer or images smaller"
            )

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Geometry":
        data, image = config.data, config.image
        return cls(
            row_length=config.row_length,
            positions=image.positions,
            per_row=image.per_row,
            size=image.size,
            image_delimiters=data.image_delimiters,
            image_attention=data.image_attention,
            image_rotary=data.image_rotary,
            caption_order=data.caption_order,
            pairs=data.rows == "pairs",
        )

    @property
    def image_span(self) -> int:
        """Positions that an image takes with its delimiters: it is never cut."""
        return self.positions + 2 * self.image_delimiters

    def packing_key(self) -> dict:
        """The fields that a row plan depends on; the others only change how its rows are filled in."""
        names = ("row_length", "positions", "per_row", "image_delimiters", "caption_order")
        return {name: getattr(self, name) for name in names} | ({"pairs": True} if self.pairs else {})
