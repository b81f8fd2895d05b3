"""What sizes a picture goes through, by its own size, its settings and the rule; computed before a pixel of it is decoded.

Also the check of those settings, and the one bound under which several pictures share a budget of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mirada.errors import MediaTooLarge, SettingsError
from mirada.media.grid import GridRule, fit
from mirada.media.rule import MediaRule, check_bounds
from mirada.types import LARGEST, Image, Video

Sizes = tuple[tuple[int, int], ...]
"""(height, width) after each resize, in order; the last after the border, where the rule gives one."""


def check_item(part: Image | Video, grid: GridRule) -> None:
    """Raise SettingsError if a picture's or video's size settings are malformed or contradict one another."""
    names = ("min_pixels", "max_pixels", "resized_height", "resized_width")
    for name in names:
        value = getattr(part, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST):
            raise SettingsError(
                f"{name}={value!r} is not a positive whole number, or too large",
                "give pixels, or None for the model's default",
            )
    if (part.resized_height is None) != (part.resized_width is None):
        raise SettingsError(
            "only one of resized_height and resized_width is given", "give both, or max_pixels to keep the ratio"
        )
    if part.min_pixels is not None or part.max_pixels is not None:
        low = 1 if part.min_pixels is None else int(part.min_pixels)
        high = max(low, grid.factor**2) if part.max_pixels is None else int(part.max_pixels)
        check_bounds(low, high, grid.factor)


@dataclass(frozen=True, slots=True)
class Plan:
    """The resizes that one picture of ``size`` (height, width) goes through."""

    part: Image
    rule: MediaRule
    size: tuple[int, int]

    def sizes(self, cap: int | None = None) -> Sizes:
        """Sizes after each resize; ``cap`` lowers the last bound, but for whole cells not below the least area that the rule
        or the picture asks for."""
        part, grid = self.part, self.rule.grid
        low, high = grid.min_pixels, grid.max_pixels
        stages: list[tuple[int, int]] = []
        if self.rule.first is not None:
            stages.append(self._first(self.rule.first.min_pixels, self.rule.first.max_pixels))
        elif part.resized_height is not None:
            stages.append(self._first(low, high))
        else:
            low, high = _bounds(part, low, high)
        if cap is not None:
            high = max(min(high, cap), low)
        last = replace(grid, min_pixels=low, max_pixels=high)
        size = stages[-1] if stages else self.size
        if grid.border != "stretch":
            stages.append(last.shrink(*size))
        stages.append(last.fit(*size))
        if self.rule.first is not None:  # the last resize will not hold what the first was asked to enlarge
            self.rule.check_resize(stages[0], self.size)
        return tuple(stages)

    def _first(self, low: int, high: int) -> tuple[int, int]:
        part, factor = self.part, self.rule.grid.factor
        if part.resized_height is not None and part.resized_width is not None:
            size = part.resized_height, part.resized_width
        else:
            size = self.size
            low, high = _bounds(part, low, high)
        return fit(*size, factor=factor, min_pixels=low, max_pixels=high, enlarge=False)

    def area(self, cap: int | None = None) -> int:
        high, wide = self.sizes(cap)[-1]
        return high * wide

    def notes(self) -> tuple[str, ...]:
        """What the model's bounds changed about what the caller asked for."""
        sizes = self.sizes()
        part, final = self.part, sizes[-1]
        area = final[0] * final[1]
        last = "the bounds of the model's image processor hold last (min_pixels, max_pixels of the model change them)"
        if part.resized_height is not None:
            asked = part.resized_height, part.resized_width
            if asked != final:
                return (f"asked for {asked[1]}x{asked[0]}, resized to {final[1]}x{final[0]}: sides are multiples of "
                        f"{self.rule.grid.factor}, and {last}",)  # fmt: skip
        elif self.rule.first is not None and sizes[0] != final and (part.max_pixels is not None or part.min_pixels is not None):
            return (f"the settings of this picture gave {sizes[0][1]}x{sizes[0][0]}, it became {final[1]}x{final[0]}: {last}",)
        elif part.max_pixels is not None and area > part.max_pixels:
            grid = self.rule.grid
            why = "no side is cut below" if grid.border == "stretch" else "sides are filled up to multiples of"
            return (f"{final[1]}x{final[0]} exceeds max_pixels={part.max_pixels}: {why} {grid.factor}",)
        return ()


def _bounds(part: Image, low: int, high: int) -> tuple[int, int]:
    """The bounds of one picture over the defaults; a default gives way where it contradicts what was asked."""
    asked_low, asked_high = part.min_pixels, part.max_pixels
    new_low = low if asked_low is None else int(asked_low)
    new_high = high if asked_high is None else int(asked_high)
    if asked_low is None:
        new_low = min(new_low, new_high)
    if asked_high is None:
        new_high = max(new_low, new_high)
    return new_low, new_high


def common_cap(plans: dict[int, Plan], budget: int, largest: int) -> int:
    """The largest area c with sum(area of each under c) <= budget: water-filling, so small pictures keep their size."""
    low, high = 1, largest  # the sum at ``high`` exceeds the budget; areas do not fall as c grows
    least = sum(plan.area(low) for plan in plans.values())
    if least > budget:
        raise MediaTooLarge(
            f"{len(plans)} pictures need at least {least:,} pixels together, more than total_pixels={budget:,}",
            "give fewer pictures, raise total_pixels, or lower min_pixels",
        )
    while high - low > 1:
        middle = (low + high) // 2
        if sum(plan.area(middle) for plan in plans.values()) <= budget:
            low = middle
        else:
            high = middle
    return low
