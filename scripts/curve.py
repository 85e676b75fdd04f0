"""One curve over steps as characters or as SVG, without a plotting library."""

from collections.abc import Sequence
from html import escape


def to_text(values: Sequence[float], title: str, width: int = 72, height: int = 12) -> str:
    """A bar chart of characters; each column shows the value at its first step."""
    top = max(values) or 1.0
    columns = min(width, len(values))
    heights = [values[i * len(values) // columns] / top * height for i in range(columns)]
    lines = [title]
    for row in range(height, 0, -1):
        label = f"{top * row / height:7.3f} |" if row in (height, height // 2) else "        |"
        lines.append(label + "".join("#" if h > row - 0.5 else " " for h in heights).rstrip())
    lines.append(f"{0:7.3f} +{'-' * columns}")
    return "\n".join([*lines, f"{'':9}0{len(values) - 1:>{columns - 1}}"])


def to_svg(values: Sequence[float], title: str) -> str:
    """An SVG file of 720 by 300, with axes from 0 to the largest value and to the last step."""
    left, right, top, bottom = 60, 700, 40, 260
    largest, last = max(values) or 1.0, max(1, len(values) - 1)
    stride = -(-len(values) // 4000)  # more points than that are not visible
    x_scale, y_scale = (right - left) / last, (bottom - top) / largest
    points = " ".join(
        f"{left + x_scale * i:.1f},{bottom - y_scale * values[i]:.1f}"
        for i in sorted({*range(0, len(values), stride), len(values) - 1})
    )
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'
        for x, y, anchor, words in (
            (left - 8, top + 5, "end", f"{largest:g}"),
            (left - 8, bottom + 5, "end", "0"),
            (left, bottom + 20, "middle", "0"),
            (right, bottom + 20, "end", f"step {last}"),
        )
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" width="720" height="300" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="720" height="300" fill="white"/><text x="{left}" y="22">{escape(title)}'
        f'</text><path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="gray"/>{labels}'
        f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/></svg>\n'
    )
