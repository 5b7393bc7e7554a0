# SPDX-License-Identifier: Apache-2.0
"""Draws what `suite.Plot` describes as SVG: the same data give the same bytes.

Letters are drawn as paths, from the font that comes with matplotlib: a picture in a page of a forge must not depend on the fonts of who
looks at it. The background is transparent. Inside a page the text has the page's colour, in a file a grey that can be read on black
and on white. Knows no suite and no page.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D

from colours import FVD, colours, is_fvd
from results import finite
from suite import Plot, Series

WIDTH = 680  # all lengths are points
MARGIN = 8
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 14, 11.5, 10.5
LINE = 16
INK, GRID = "#010203", "#010204"  # stand for the page's colours until the end
IN_FILE = {INK: "#7b8088", GRID: "#7b8088"}
IN_PAGE = {INK: "currentColor", GRID: "currentColor"}
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "fvd",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name may hold any characters
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.unicode_minus": False,
    "path.simplify": False,
}
BAR, BAR_GAP, GROUP_GAP = 13, 4, 10  # of horizontal bars
UPRIGHT_MAX = 16  # bars; more of them lie
PLOT_HEIGHT = 230
FACTOR_OF_LOGARITHMIC_X = 16
POINTS_OF_A_DISTRIBUTION = 300
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))
MARKERS = "osD^vP"


class NothingToDraw(Exception):
    """The plot holds no number."""


@dataclass
class Sheet:
    """A figure with its header: title, what the values are, the legend. `top`: how high the header is."""

    figure: Figure
    height: float
    top: float

    def axes(self, left: float, bottom: float, right: float = MARGIN) -> Axes:
        width, height = WIDTH - left - right, self.height - self.top - bottom
        axes = self.figure.add_axes((left / WIDTH, bottom / self.height, width / WIDTH, height / self.height))
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.patch.set_alpha(0)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=SMALL_SIZE, pad=4)
        return axes


def why_not(error: Exception) -> str:
    return "no figures" if isinstance(error, NothingToDraw) else f"{type(error).__name__}: {error}"


def text_width(text: str, size: float, bold: bool = False) -> float:
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def wrapped(text: str, size: float, width: float, bold: bool = False) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size, bold) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def short(value: float, zeros: bool = False) -> str:
    """Three digits, and k or M behind: 123k, 12.3, 0.0123. `zeros`: also those at the end."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * (10 if suffix == "k" else 1):
            return short(value / factor, zeros) + suffix
    value = float(f"{value:.3g}") if abs(value) < 100 else value
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if abs(value) < 100 else 0
    written = f"{value:.{min(digits, 6)}f}"
    return written.rstrip("0").rstrip(".") if "." in written and not zeros else written


def middle_label(values: Sequence[float]) -> str:
    return short(statistics.median(values), zeros=not all(float(value).is_integer() for value in values))


def hint(plot: Plot) -> str:
    words = [str(plot.get("unit") or "")]
    if plot.get("better"):
        words.append(f"{plot['better']} is better")
    return ", ".join(word for word in words if word)


def legend_rows(names: Sequence[str]) -> list[list[str]]:
    rows: list[list[str]] = [[]]
    used = 0.0
    for name in names:
        width = 34 + text_width(name, TEXT_SIZE, is_fvd(name))
        if rows[-1] and used + width > WIDTH - 2 * MARGIN:
            rows.append([])
            used = 0.0
        rows[-1].append(name)
        used += width
    return rows


def sheet(plot: Plot, body: float, legend: dict[str, dict[str, Any]] | None = None) -> Sheet:
    """A figure whose body (axes and what belongs to them) is so high. `legend`: how each series is drawn."""
    title = wrapped(str(plot.get("title") or plot["name"]), TITLE_SIZE, WIDTH - 2 * MARGIN, bold=True)
    rows = legend_rows(list(legend)) if legend else []
    top = MARGIN + len(title) * 18 + (LINE if hint(plot) else 0) + len(rows) * LINE + 14
    height = top + body
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    y = height - MARGIN
    for line in title:
        figure.text(MARGIN / WIDTH, (y - 13) / height, line, size=TITLE_SIZE, weight="bold", va="baseline")
        y -= 18
    if hint(plot):
        figure.text(MARGIN / WIDTH, (y - 11) / height, hint(plot), size=SMALL_SIZE, va="baseline", alpha=0.8)
        y -= LINE
    points = Affine2D().scale(1 / WIDTH, 1 / height) + figure.transFigure
    for row in rows:
        x = float(MARGIN)
        y -= LINE
        for name in row:
            look = (legend or {})[name]
            if "linestyle" in look:
                figure.add_artist(Line2D([x, x + 9, x + 18], [y + 5] * 3, transform=points, **look, markevery=[1]))
            else:
                figure.add_artist(Rectangle((x + 4, y), 11, 11, transform=points, linewidth=0, **look))
            bold = is_fvd(name)
            figure.text((x + 23) / WIDTH, (y + 1.5) / height, name, size=TEXT_SIZE, weight="bold" if bold else "normal", va="baseline")
            x += 34 + text_width(name, TEXT_SIZE, bold)
    return Sheet(figure, height, top)


def samples(series: Series, index: int) -> list[float]:
    points = series.get("points") or []
    return finite(points[index]) if index < len(points) else []


def drawable(plot: Plot) -> list[Series]:
    """The series that have a number, each name once."""
    found: dict[str, Series] = {}
    for series in plot.get("series") or []:
        if any(finite(point) for point in series.get("points") or []):
            found.setdefault(str(series["name"]), series)
    if not found:
        raise NothingToDraw(str(plot["name"]))
    return [{"name": name, "points": series["points"]} for name, series in found.items()]


def everything(series: Sequence[Series]) -> list[float]:
    return [value for one in series for point in one["points"] for value in finite(point)]


def span(plot: Plot, series: Sequence[Series]) -> tuple[float, float, bool]:
    """Where the axis of values begins and ends, and whether it is logarithmic."""
    values = everything(series) + finite([plot.get("goal")])
    logarithmic = bool(plot.get("logarithmic")) and min(values) > 0
    if logarithmic:
        low = 10 ** math.floor(math.log10(min(values)))
        return (low / 2 if min(values) < low * 1.3 else low), max(values) * 1.5, True
    return min(0.0, min(values) * 1.05), (max(values) * 1.04 or 1.0), False


def scale(axis: Any, low: float, high: float, logarithmic: bool) -> None:
    """Ticks of an axis of values."""
    if logarithmic:
        many = math.log10(high / low) > 2
        axis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0), numticks=12))
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def goal_line(plot: Plot, axes: Axes, upright: bool) -> None:
    """`upright`: it stands, because the bars lie."""
    for goal in finite([plot.get("goal")]):
        line = axes.axvline if upright else axes.axhline
        line(goal, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.85, zorder=4)
        words = f"goal {short(goal)}"
        style: dict[str, Any] = {"size": SMALL_SIZE, "style": "italic", "zorder": 5}
        if upright:
            axes.annotate(words, (goal, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", **style)
        else:
            axes.annotate(words, (1, goal), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", **style)


def one_bar(axes: Axes, position: float, thickness: float, values: list[float], low: float, colour: str, upright: bool) -> None:
    middle = statistics.median(values)
    base = low if low > 0 else 0
    draw = axes.bar if upright else axes.barh
    thick: dict[str, Any] = {"width": thickness} if upright else {"height": thickness}
    start: dict[str, Any] = {"bottom": base} if upright else {"left": base}
    draw(position, middle - base, color=colour, linewidth=0, **thick, **start)
    if len(values) > 1:
        # White where it lies on the bar, which is dark enough; else like the text.
        for end, colour, alpha in ((min(values), "#ffffff", 0.85), (max(values), INK, 0.75)):
            pair = ([position, position], [middle, end]) if upright else ([middle, end], [position, position])
            mark: dict[str, Any] = {"marker": "_" if upright else "|", "markersize": 5, "markeredgewidth": 1.2, "markevery": [1]}
            axes.plot(*pair, color=colour, linewidth=1.2, alpha=alpha, solid_capstyle="butt", **mark)


def stands(plot: Plot, series: Sequence[Series]) -> bool:
    """Whether upright bars are wide enough: for their values above and the categories below."""
    categories = [str(x) for x in plot["x"]]
    if len(categories) * len(series) > UPRIGHT_MAX or len(categories) > 6 or len(series) > 6:
        return False
    group = (WIDTH - 70) / len(categories)
    widest = max(text_width(short(value, zeros=True), SMALL_SIZE) for value in everything(series))
    return widest < group * 0.84 / len(series) and all(text_width(name, TEXT_SIZE) < group for name in categories)


def bar_colours(plot: Plot, series: Sequence[Series], apart: bool) -> dict[tuple[str, str], str]:
    """Of each (series, category). Where the categories are what is compared, they have the colours."""
    categories = [str(x) for x in plot["x"]]
    by_series = colours((one["name"] for one in series), apart=apart)
    found = {(name, category): colour for name, colour in by_series.items() for category in categories}
    if any(is_fvd(category) for category in categories) and not any(is_fvd(name) for name in by_series):
        by_category = colours(categories, apart=False)
        if len(series) == 1:
            return {(series[0]["name"], category): by_category[category] for category in categories}
        if not apart:
            found |= {(name, category): FVD[0] for name, category in found if is_fvd(category)}
    return found


def bars(plot: Plot) -> Figure:
    series = drawable(plot)
    return standing_bars(plot, series) if stands(plot, series) else lying_bars(plot, series)


def standing_bars(plot: Plot, series: list[Series]) -> Figure:
    names = [one["name"] for one in series]
    categories = [str(x) for x in plot["x"]]
    colour = bar_colours(plot, series, apart=True)
    legend = {name: {"facecolor": colour[name, categories[0]]} for name in names} if len(names) > 1 else None
    page = sheet(plot, PLOT_HEIGHT + 26, legend)
    low, high, logarithmic = span(plot, series)
    axes = page.axes(left=52, bottom=26)
    if logarithmic:
        axes.set_yscale("log")
    margin = 16 / PLOT_HEIGHT  # for the figure above the highest bar
    axes.set_ylim(low, high * (high / low) ** margin if logarithmic else high + (high - low) * margin)
    scale(axes.yaxis, low, high, logarithmic)
    axes.grid(axis="y", color=GRID, alpha=0.22, linewidth=0.8)
    thickness = min(0.8 / len(series), 0.3)
    for place, one in enumerate(series):
        for index in range(len(categories)):
            position = index + (place - (len(series) - 1) / 2) * thickness
            values = samples(one, index)
            if not values:
                axes.annotate("–", (position, low), (0, 3), textcoords="offset points", ha="center", size=SMALL_SIZE)
                continue
            one_bar(axes, position, thickness * 0.88, values, low, colour[one["name"], categories[index]], upright=True)
            label, weight = middle_label(values), "bold" if is_fvd(one["name"]) else "normal"
            top = (position, max(values))
            axes.annotate(label, top, (0, 4), textcoords="offset points", ha="center", size=SMALL_SIZE, weight=weight, zorder=6)
    axes.set_xlim(-0.5, len(categories) - 0.5)
    axes.set_xticks(range(len(categories)), categories, size=TEXT_SIZE)
    for category, tick in zip(categories, axes.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if is_fvd(category) else "normal")
    axes.axhline(low if logarithmic else 0, color=INK, linewidth=1, alpha=0.6)
    goal_line(plot, axes, upright=False)
    return page.figure


def lying_bars(plot: Plot, series: list[Series]) -> Figure:
    """The name of each bar stands beside it, so that there is no legend."""
    categories = [str(x) for x in plot["x"]]
    colour = bar_colours(plot, series, apart=False)
    grouped = len(series) > 1
    place, lines = 0.0, []  # (name, where its middle is, its samples, its colour)
    headings = []
    for index, category in enumerate(categories):
        if grouped:
            place += (GROUP_GAP if index else 0) + LINE
            headings.append((category, place - 3))
        for one in series:
            values = samples(one, index)
            if values or not grouped:
                lines.append((one["name"] if grouped else category, place + BAR / 2, values, colour[one["name"], category]))
                place += BAR + BAR_GAP
    above = 14 if finite([plot.get("goal")]) else 0
    page = sheet(plot, place + above + 24)
    page.top += above
    low, high, logarithmic = span(plot, series)
    bold = {line[0] for line in lines if grouped and is_fvd(line[0])}
    left = min(WIDTH * 0.42, MARGIN * 2 + max(text_width(name, TEXT_SIZE, name in bold) for name, *_ in lines))
    axes = page.axes(left=left, bottom=24, right=46)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(place, 0)
    scale(axes.xaxis, low, high, logarithmic)
    axes.grid(axis="x", color=GRID, alpha=0.22, linewidth=0.8)
    axes.set_yticks([])
    for heading, y in headings:
        where: dict[str, Any] = {"xycoords": ("figure points", "data"), "textcoords": "offset points"}
        axes.annotate(heading, (MARGIN, y), (0, 0), size=TEXT_SIZE, weight="bold", va="baseline", annotation_clip=False, **where)
    for name, y, values, its_colour in lines:
        size = TEXT_SIZE * min(1.0, (left - 12) / text_width(name, TEXT_SIZE, name in bold)) if name else TEXT_SIZE
        style: dict[str, Any] = {"size": size, "weight": "bold" if name in bold else "normal"}
        beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(name, (0, y), (-6, 0), ha="right", annotation_clip=False, **style, **beside)
        if not values:
            axes.annotate("not measured", (0, y), (4, 0), size=SMALL_SIZE, style="italic", **beside)
            continue
        one_bar(axes, y, BAR, values, low, its_colour, upright=False)
        end = (max(values), y)
        label: dict[str, Any] = {"size": SMALL_SIZE, "weight": style["weight"], "va": "center_baseline", "zorder": 6}
        axes.annotate(middle_label(values), end, (5, 0), textcoords="offset points", **label)
    axes.axvline(low if logarithmic else 0, color=INK, linewidth=1, alpha=0.6)
    goal_line(plot, axes, upright=True)
    return page.figure


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How the line of each series is drawn: who cannot tell the colours tells the dashes."""
    colour = colours(names, apart=True)
    dashes, marks = itertools.cycle(DASHES), itertools.cycle(MARKERS)
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(names, key=lambda name: not is_fvd(name)):
        strong = is_fvd(name)
        dash, mark = next(dashes), next(marks)
        found[name] = {"color": colour[name], "linewidth": 2.4 if strong else 1.7, "linestyle": dash, "marker": mark, "markersize": 4.5}
    return {name: found[name] for name in names}


def lines(plot: Plot) -> Figure:
    series = drawable(plot)
    look = looks([one["name"] for one in series])
    page = sheet(plot, PLOT_HEIGHT + 44, look if len(look) > 1 else None)
    low, high, logarithmic = span(plot, series)
    axes = page.axes(left=52, bottom=42, right=18)
    numbers = [float(x) for x in plot["x"]]
    drawn: list[float] = []
    for one in series:
        points = sorted((x, samples(one, index)) for index, x in enumerate(numbers) if samples(one, index))
        xs = [x for x, _ in points]
        drawn += xs
        style = look[one["name"]]
        if any(len(values) > 1 for _, values in points):
            bottom, top = [min(values) for _, values in points], [max(values) for _, values in points]
            axes.fill_between(xs, bottom, top, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(xs, [statistics.median(values) for _, values in points], **style, zorder=4 if is_fvd(one["name"]) else 3)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    scale(axes.yaxis, low, high, logarithmic)
    if min(drawn) > 0 and max(drawn) / min(drawn) >= FACTOR_OF_LOGARITHMIC_X:
        axes.set_xscale("log")
    places = sorted(set(drawn))
    if len(places) <= 10:
        axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(color=GRID, alpha=0.22, linewidth=0.8)
    axes.set_xlabel(str(plot.get("x_unit") or ""), size=SMALL_SIZE)
    goal_line(plot, axes, upright=False)
    return page.figure


def shares(values: list[float]) -> Iterator[tuple[float, float]]:
    """Value, and how many nines of the samples are below it: 1 for 90 %, 2 for 99 %."""
    ordered = sorted(values)
    most = math.log10(2 * len(ordered))
    steps = min(len(ordered), POINTS_OF_A_DISTRIBUTION)
    for step in range(steps):
        nines = most * (step + 0.5) / steps
        yield ordered[min(len(ordered) - 1, int((1 - 10**-nines) * len(ordered)))], nines


def distribution(plot: Plot) -> Figure:
    """The axis of shares has a step for every nine, because the slow ones are what one looks for."""
    series = drawable(plot)
    look = {
        name: {key: style[key] for key in ("color", "linewidth", "linestyle")} for name, style in looks([s["name"] for s in series]).items()
    }
    page = sheet({**plot, "unit": "share of the samples below a value"}, PLOT_HEIGHT + 44, look if len(look) > 1 else None)
    axes = page.axes(left=60, bottom=42, right=18)
    values = everything(series)
    count = max(len(everything([one])) for one in series)
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and min(values) >= 0
    low, high = (min(positive) * 0.9, max(values) * 1.1) if logarithmic else (min(values), max(values) * 1.04 or 1.0)
    for one in series:
        xs, ys = zip(*shares([max(value, low) for value in everything([one])]), strict=True)  # what is 0 lies on the edge
        axes.plot(xs, ys, **look[one["name"]], zorder=4 if is_fvd(one["name"]) else 3)
    if logarithmic:
        axes.set_xscale("log")
    if high > low:
        axes.set_xlim(low, high)
    scale(axes.xaxis, low, high, logarithmic)
    axes.set_ylim(0, math.log10(2 * count))
    ticks = [(0.0, "0 %"), (math.log10(2), "50 %"), (1, "90 %"), (2, "99 %"), (3, "99.9 %"), (4, "99.99 %"), (5, "99.999 %")]
    axes.set_yticks([at for at, _ in ticks if at <= math.log10(2 * count)], [name for at, name in ticks if at <= math.log10(2 * count)])
    axes.grid(color=GRID, alpha=0.22, linewidth=0.8)
    axes.set_xlabel(str(plot.get("unit") or ""), size=SMALL_SIZE)
    return page.figure


KINDS = {"bars": bars, "lines": lines, "distribution": distribution}


def described(plot: Plot) -> str:
    return ": ".join(part for part in (str(plot.get("title") or plot["name"]), hint(plot)) if part)


def svg(plot: Plot, *, in_page: bool, prefix: str = "") -> str:
    """The picture. `prefix`: before every id in it, so that several can stand in one page."""
    with matplotlib.rc_context(cast(Any, SETTINGS)):
        figure = KINDS[plot["kind"]](plot)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<!--.*?-->\s*", "", written.getvalue(), flags=re.S)  # they repeat the letters
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = text[text.index("<svg") :]
    for stands_for, colour in (IN_PAGE if in_page else IN_FILE).items():
        text = text.replace(stands_for, colour)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = text.replace("url(#", f"url(#{prefix}")
    name = html.escape(described(plot))
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    attributes = f'viewBox="{size[0].split(chr(34))[1]}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    attributes += f' role="img" aria-label="{name}"'
    if not in_page:
        attributes += f' width="{size[1]}" height="{size[2]}"'
    return re.sub(r"<svg[^>]*>", lambda _: f"<svg {attributes}>\n<title>{name}</title>", text, count=1)
